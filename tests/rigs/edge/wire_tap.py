"""A listener on the wire between device and cloud: it passes every byte on and reads gRPC's messages out of them.

It reads HTTP/2 frames (RFC 9113, section 4.1) and length-prefixed messages (gRPC over HTTP/2) by itself, so that what
the device says of its messages is compared with what a stranger on the wire would see.
"""

import contextlib
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA: Final = 0
_PADDED: Final = 8


class Reader:
    """Reads one direction of one connection: ``messages`` in the order in which they ended, ``total`` bytes."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.total = 0
        self._held = b""
        self._begun = False
        self._streams: dict[int, bytes] = defaultdict(bytes)

    def read(self, content: bytes) -> None:
        self.total += len(content)
        self._held += content
        if not self._begun:
            if len(self._held) < len(_PREFACE):
                return
            assert self._held.startswith(_PREFACE)
            self._held, self._begun = self._held[len(_PREFACE) :], True
        while len(self._held) >= 9:
            size = int.from_bytes(self._held[:3])
            if len(self._held) < 9 + size:
                return
            kind, flags, stream = self._held[3], self._held[4], int.from_bytes(self._held[5:9]) & 0x7FFFFFFF
            payload, self._held = self._held[9 : 9 + size], self._held[9 + size :]
            if kind == _DATA:
                if flags & _PADDED:
                    payload = payload[1 : len(payload) - payload[0]]
                self._take(stream, payload)

    def _take(self, stream: int, payload: bytes) -> None:
        held = self._streams[stream] + payload
        while len(held) >= 5:
            size = int.from_bytes(held[1:5])
            if len(held) < 5 + size:
                break
            assert held[0] == 0, "a compressed message"
            self.messages.append(held[5 : 5 + size])
            held = held[5 + size :]
        self._streams[stream] = held


class Tap:
    """``port``: where the device connects. ``up``: what came from it, one reader per connection."""

    def __init__(self, listening: socket.socket, to_port: int) -> None:
        self.port: int = listening.getsockname()[1]
        self.up: list[Reader] = []
        self._listening = listening
        self._to_port = to_port
        threading.Thread(target=self._accept, daemon=True).start()

    def messages(self) -> list[bytes]:
        """Return every message that the device has sent so far."""
        return [message for reader in self.up for message in reader.messages]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                device, _ = self._listening.accept()
                cloud = socket.create_connection(("127.0.0.1", self._to_port))
                reader = Reader()
                self.up.append(reader)
                threading.Thread(target=self._pass, args=(device, cloud, reader), daemon=True).start()
                threading.Thread(target=self._pass, args=(cloud, device, None), daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, reader: Reader | None) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                if reader is not None:
                    reader.read(content)
                to.sendall(content)
        for each in (source, to):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextmanager
def tapped(to_port: int) -> Iterator[Tap]:
    """Listen on a free port of this machine, and pass on to ``to_port``."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Tap(listening, to_port)
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
