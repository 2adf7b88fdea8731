"""A hostile client: raw HTTP/2 that opens gRPC calls and does not finish them, which no gRPC library does.

It implements a small part of RFC 9113: the preface, SETTINGS, HEADERS with literal fields (RFC 7541, section 6.2.2,
without Huffman coding) and DATA. From the server's frames it reads settings and ends of streams; it ignores the others.
"""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from tests.rigs.project.patience import HANGS_S

DEVICES: Final = "/isthmus.v1.PersonalisationService/"
CROWDS: Final = {
    "headers alone": (DEVICES + "Enrol", b"", None),
    "all but a byte": (DEVICES + "Enrol", b"\x0a\x03ab", 6),
    "no token": (DEVICES + "WatchJob", b"", None),
    "a stream without a token": ("/isthmus.v1.InferenceService/Infer", b"", None),
    "health checks": ("/grpc.health.v1.Health/Check", b"", None),
    "health watches": ("/grpc.health.v1.Health/Watch", b"\x0a\x00", None),
    "reflection": ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x3a\x01*", None),
}
"""Kinds of calls that stay unfinished: method, message, and the announced length if it differs."""

ANY_NUMBER: Final = 1 << 31
"""Streams of a connection before the server has said how many it allows."""
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW = 3, 4
_FRAME_BYTES: Final = 16_384


class RawClient:
    """A connection. Streams have odd numbers from 1."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), HANGS_S)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0))
        self._socket.setblocking(False)
        self._received = b""
        self._next = 1
        self._window = 65_535
        self.most_streams = ANY_NUMBER
        self.open: set[int] = set()
        self.closed = False

    def close(self) -> None:
        self._socket.close()

    def call(self, path: str, *, message: bytes = b"", announce: int | None = None, end: bool = False) -> int:
        """Open a call, with ``message`` if given; ``announce`` may claim more bytes. Return its stream."""
        stream, self._next = self._next, self._next + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        self.open.add(stream)
        self._send(_frame(_HEADERS, _END_HEADERS, stream, b"".join(map(_literal, fields, fields.values()))))
        if message or announce is not None:
            self.send(stream, struct.pack(">BI", 0, len(message) if announce is None else announce) + message, end=end)
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send the part of ``data`` that fits into the connection's window at once."""
        data = data[: self._window]
        self._window -= len(data)
        for start in range(0, len(data), _FRAME_BYTES):
            part = data[start : start + _FRAME_BYTES]
            last = end and start + len(part) == len(data)
            self._send(_frame(_DATA, _END_STREAM if last else 0, stream, part))

    def read(self, seconds: float = 0.0) -> None:
        """Read from the server for ``seconds``."""
        until_s = time.monotonic() + seconds
        while not self.closed:
            try:
                data = self._socket.recv(1 << 20)
                self._received += data
                self.closed = not data
            except BlockingIOError:
                if time.monotonic() >= until_s:
                    return
                time.sleep(0.005)
            except OSError:
                self.closed = True
            self._take_frames()

    def _take_frames(self) -> None:
        while len(self._received) >= 9:
            length, kind, flags = int.from_bytes(self._received[:3]), self._received[3], self._received[4]
            if len(self._received) < 9 + length:
                return
            stream, payload = int.from_bytes(self._received[5:9]), self._received[9 : 9 + length]
            self._received = self._received[9 + length :]
            if kind == _SETTINGS and not flags & _ACK:
                for name, value in struct.iter_unpack(">HI", payload):
                    if name == _MAX_CONCURRENT_STREAMS:
                        self.most_streams = value
                self._send(_frame(_SETTINGS, _ACK, 0))
            elif kind == _PING and not flags & _ACK:
                self._send(_frame(_PING, _ACK, 0, payload))
            elif kind == _WINDOW_UPDATE and stream == 0:
                self._window += int.from_bytes(payload)
            elif kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                self.open.discard(stream)
            elif kind == _GOAWAY:
                self.closed = True

    def _send(self, data: bytes) -> None:
        until_s = time.monotonic() + 60  # a server that reads no more has had enough of this connection
        while data and not self.closed:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                if time.monotonic() > until_s:
                    self.closed = True
                time.sleep(0.005)
            except OSError:
                self.closed = True


class Crowd:
    """Keeps ``count`` calls to ``path`` open. Ended calls are opened again, on new connections if necessary."""

    def __init__(self, port: int, path: str, count: int, *, message: bytes = b"", announce: int | None = None) -> None:
        self._port, self._path, self._count = port, path, count
        self._message, self._announce = message, announce
        self._clients: list[RawClient] = []
        self.opened = 0

    @property
    def open(self) -> int:
        """The number of calls that the server has not ended."""
        return sum(len(client.open) for client in self._clients if not client.closed)

    def press(self) -> None:
        """Read what the server sent, and open calls until ``count`` are open."""
        for client in self._clients:
            client.read()
        self._clients = [client for client in self._clients if not client.closed]
        missing = self._count - self.open
        for client in self._clients:
            missing -= self._fill(client, missing)
        while missing > 0 and len(self._clients) < 40:
            client = RawClient(self._port)
            client.read(0.05)
            self._clients.append(client)
            missing -= self._fill(client, missing)

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.close()

    def _fill(self, client: RawClient, missing: int) -> int:
        room = max(0, min(missing, client.most_streams - len(client.open)))
        for _ in range(room):
            client.call(self._path, message=self._message, announce=self._announce)
        self.opened += room
        return room


@contextmanager
def idle_sockets(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Hold ``count`` connections that send nothing."""
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), HANGS_S)) for _ in range(count)]


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def _literal(name: str, value: str) -> bytes:
    parts = (name.encode(), value.encode())
    return b"\0" + b"".join(bytes((len(part),)) + part for part in parts)
