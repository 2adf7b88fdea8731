"""The device's socket under hostile and clumsy clients."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.edge.requests.local_socket import MOST_QUESTION_BYTES, NAME, LocalSocket, call
from isthmus.proto.errors import Corrupt, InvalidInput, Unavailable

AS_NOBODY = """
import os, socket, sys
os.setgid(65534), os.setuid(65534)
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except PermissionError:
    print("refused")
"""


def connected(folder: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(str(folder / NAME))
    return client


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path that every user may reach; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_lines_are_answered_in_order_until_the_block_ends(folder: Path) -> None:
    with LocalSocket(folder, bytes.upper):
        assert call(folder, b"one") == b"ONE"
        with connected(folder) as client:
            client.sendall(b"two\nthree\nfo")
            client.sendall(b"ur\n")
            assert client.makefile("rb").read(15) == b"TWO\nTHREE\nFOUR\n"
    assert not (folder / NAME).exists()
    assert call(folder, b"one") is None


def test_only_the_owner_gets_in(folder: Path) -> None:
    with LocalSocket(folder, bytes.upper):
        assert stat.S_IMODE((folder / NAME).stat().st_mode) == 0o600
        if os.getuid() == 0:
            command = [sys.executable, "-I", "-c", AS_NOBODY, str(folder / NAME)]
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"


def test_a_socket_that_a_killed_process_left_is_replaced(folder: Path) -> None:
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(folder / NAME))
    left.close()
    assert call(folder, b"one") is None, "nobody listens"
    with LocalSocket(folder, bytes.upper):
        assert call(folder, b"one") == b"ONE"
    (folder / NAME).mkdir()
    assert call(folder, b"one") is None
    with pytest.raises(Corrupt, match="move it away"), LocalSocket(folder, bytes.upper):
        pass


def test_a_path_longer_than_a_sockets_address(folder: Path) -> None:
    deep = folder / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    with LocalSocket(deep, bytes.upper):
        assert call(deep, b"one") == b"ONE"


def test_clients_that_hold_their_connection_do_not_hold_up_the_device(folder: Path) -> None:
    with LocalSocket(folder, lambda line: b"x" * (1 << 20), within_s=0.05):
        silent = [connected(folder) for _ in range(4)]
        half = [connected(folder) for _ in range(4)]
        for client in half:
            client.sendall(b"no end of line")
        while (answer := _attempt(folder)) is None:
            pass  # all places are taken, until the time of the eight is over
        assert len(answer) == 1 << 20
        deaf = connected(folder)
        deaf.sendall(b"one\n" * 4)  # the answers fill every buffer, and nobody reads
        while _attempt(folder) is None:
            pass  # until the time of the deaf one is over
        for client in (*silent, *half, deaf):
            client.close()


def _attempt(folder: Path) -> bytes | None:
    try:
        return call(folder, b"one")
    except Unavailable:
        return None


def test_a_line_without_end_is_bounded(folder: Path) -> None:
    with LocalSocket(folder, bytes.upper), connected(folder) as client:
        try:
            client.sendall(b"x" * (8 * MOST_QUESTION_BYTES))
            assert client.recv(1) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass  # the device closed the connection
        assert call(folder, b"one") == b"ONE"
    with pytest.raises(InvalidInput, match="at most"):
        call(folder, b"x" * (MOST_QUESTION_BYTES + 1))


def test_a_device_that_does_not_answer_in_time(folder: Path) -> None:
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    silent.bind(str(folder / NAME))
    silent.listen(1)
    with silent, pytest.raises(Unavailable, match="did not answer within"):
        call(folder, b"one", within_s=0.01)
