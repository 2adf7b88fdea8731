"""A TCP proxy that a test can cut: for who is behind it, and for who is before it, the other one was killed."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Cut:
    """Connections go to ``target``, HOST:PORT, until ``cut`` is called; ``mend`` lets new ones through again."""

    target: tuple[str, int]
    is_cut: bool = False
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    _open: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def cut(self) -> None:
        self.is_cut = True
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut = False

    def run(self) -> None:
        """Accepts connections until the listener is closed."""
        with suppress(OSError):
            while True:
                front, _ = self.listener.accept()
                if self.is_cut:
                    front.close()
                    continue
                behind = socket.create_connection(self.target)
                self._open += [front, behind]
                for source, target in ((front, behind), (behind, front)):
                    threading.Thread(target=_pass, args=(source, target), daemon=True).start()


@contextmanager
def cuttable(url: str) -> Iterator[Cut]:
    """Yields a proxy to the server at ``url``."""
    host, _, port = url.removeprefix("http://").partition(":")
    made = Cut((host, int(port)))
    threading.Thread(target=made.run, daemon=True).start()
    try:
        yield made
    finally:
        made.cut()
        made.listener.close()


def _pass(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
