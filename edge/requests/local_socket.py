"""A socket in the device's state folder, through which other processes of the same user talk to the running device.

One line is sent for each line received. The socket has mode 0600 in a folder of mode 0700, and connections of other
users are closed unread. Lines, connections and times are bounded, so no client can hold up the device.
"""

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from isthmus.edge.student.disk import disk_errors
from isthmus.proto.errors import Busy, InvalidInput, Unavailable

log = logging.getLogger(__name__)

NAME: Final = "socket"
MOST_QUESTION_BYTES: Final = 64 << 10
MOST_ANSWER_BYTES: Final = 1 << 20

_CONNECTIONS: Final = 8
_WITHIN_S: Final = 10.0
"""Time for one whole line to arrive, and for one whole answer to be read."""
_LONGEST_NAME: Final = 100
"""Bytes of a path that every system accepts as the address of a socket. Linux accepts 107."""


class LocalSocket:
    """Answers lines on the socket of ``folder`` while the block runs. A socket that a killed process left is replaced.

    ``answer`` gets a line without its end and returns one; it is called in several threads and must not raise. The
    caller holds the folder (``DeviceState.held``). Entering raises Corrupt if the socket's place is taken by a folder,
    OSError if the file system has no sockets.

    >>> with LocalSocket(folder, bytes.upper):
    ...     call(folder, b"who is there?")
    b'WHO IS THERE?'
    """

    def __init__(self, folder: Path, answer: Callable[[bytes], bytes], *, within_s: float = _WITHIN_S) -> None:
        self._path = folder / NAME
        self._answer = answer
        self._within_s = within_s
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._closing = False

    def __enter__(self) -> "LocalSocket":
        self._listener = _bound(self._path)
        self._thread = threading.Thread(target=self._accept, name="isthmus-socket", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in tuple(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("the device's socket: %s", error)
                    time.sleep(1.0)  # Too many open files, for instance.
                continue
            if not _is_ours(connection) or not self._free.acquire(blocking=False):
                connection.close()
                continue
            self._open.add(connection)
            threading.Thread(target=self._talk, args=(connection,), name="isthmus-request", daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):
                for line in _lines(connection, MOST_QUESTION_BYTES, self._within_s):
                    connection.settimeout(self._within_s)
                    connection.sendall(self._answer(line) + b"\n")
        finally:
            self._open.discard(connection)
            self._free.release()


def call(folder: Path, line: bytes, *, within_s: float = _WITHIN_S) -> bytes | None:
    """Send a line to the device that runs in ``folder`` and return its answer; None if none listens there.

    Raises InvalidInput if the folder is another user's or the line is too long, Busy if the device has too many
    connections, and Unavailable if no whole answer came in time.
    """
    if len(line) > MOST_QUESTION_BYTES:
        raise InvalidInput(f"a request may have at most {MOST_QUESTION_BYTES} bytes, this one has {len(line)}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(within_s)
        try:
            with _address(folder / NAME) as address:
                connection.connect(address)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        except PermissionError as error:
            raise InvalidInput(f"the device in {folder} is run by another user; ask as that user") from error
        except BlockingIOError as error:
            raise Busy(f"the device in {folder} has too many connections; try again", retry_after_s=1.0) from error
        try:
            connection.sendall(line + b"\n")
            answer = next(_lines(connection, MOST_ANSWER_BYTES, within_s), None)
        except TimeoutError as error:
            raise Unavailable(f"the device in {folder} did not answer within {within_s:g} s; try again") from error
        except OSError:
            answer = None
    if answer is None:
        raise Unavailable(f"the device in {folder} closed the connection; try again")
    return answer


def _lines(connection: socket.socket, most_bytes: int, within_s: float) -> Iterator[bytes]:
    """Yield whole lines. End at the end of the stream and at a line that is too long; raise OSError."""
    held = bytearray()
    until_s = time.monotonic() + within_s
    while True:
        line, end, rest = held.partition(b"\n")
        if end:
            yield bytes(line)
            held, until_s = rest, time.monotonic() + within_s
            continue
        if len(held) > most_bytes:
            return
        connection.settimeout(max(0.001, until_s - time.monotonic()))
        received = connection.recv(min(1 << 16, most_bytes + 2 - len(held)))
        if not received:
            return
        held += received


def _bound(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with disk_errors():
            path.unlink(missing_ok=True)
        with suppress(OSError):  # Linux takes over this mode, so nobody else can connect before the chmod below.
            os.fchmod(listener.fileno(), 0o600)
        with _address(path) as address:
            listener.bind(address)
        path.chmod(0o600)
        listener.listen(2 * _CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    return listener


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """Yield a name of ``path`` that is short enough for a socket."""
    if len(os.fsencode(path)) <= _LONGEST_NAME:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _is_ours(connection: socket.socket) -> bool:
    """Return whether this user, or root, is at the other end. Without a way to tell, the mode alone decides."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user in (os.geteuid(), 0)
