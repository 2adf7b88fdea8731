"""What is sent to the service manager, received at a real socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.edge.agent.service_manager import MOST_STATUS, ServiceManager


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        monkeypatch.chdir(tmp_path)
        listening.bind("notify")
        listening.setblocking(False)
        yield listening


def sent(manager: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(manager.recv(4096).decode())
        except BlockingIOError:
            return messages


def reporting(path: Path, **variables: str) -> tuple[ServiceManager, list[float]]:
    now = [100.0]
    return ServiceManager({"NOTIFY_SOCKET": str(path / "notify"), **variables}, lambda: now[0]), now


def test_the_life_of_a_service(manager: socket.socket, tmp_path: Path) -> None:
    service, now = reporting(tmp_path, WATCHDOG_USEC="40000000")
    service.ready()
    service.status("capturing,\nstudent 'base'\x1b")
    service.status("capturing, student 'base'\x1b")
    assert sent(manager) == ["READY=1", "WATCHDOG=1", "STATUS=capturing, student 'base'\x1b"]
    for _ in range(100):  # 25 s in a busy loop: the manager hears of it every 10 s
        now[0] += 0.25
        service.alive()
    assert sent(manager) == ["WATCHDOG=1"] * 2
    service.status("x" * 999)
    service.stopping()
    assert sent(manager) == [f"STATUS={'x' * MOST_STATUS}", "STOPPING=1"]


@pytest.mark.parametrize(
    "variables",
    [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "40000000", "WATCHDOG_PID": "1"}],
    ids=["no watchdog", "nonsense", "meant for another process"],
)
def test_without_a_watchdog_it_is_not_fed(manager: socket.socket, tmp_path: Path, variables: dict[str, str]) -> None:
    service, _ = reporting(tmp_path, **variables)
    service.alive()
    assert sent(manager) == []


def test_an_abstract_socket_is_one_too() -> None:
    name = f"isthmus-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}, lambda: 0.0).ready()
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "notify", "/nowhere/notify", "@nobody-listens-here"])
def test_a_manager_that_is_not_there_is_no_trouble(address: str) -> None:
    service = ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1"}, lambda: 0.0)
    service.ready()
    service.status("still here")
    service.stopping()


def test_a_manager_that_does_not_read_blocks_nothing(manager: socket.socket, tmp_path: Path) -> None:
    service, now = reporting(tmp_path, WATCHDOG_USEC="4")
    for _ in range(2_000):
        now[0] += 1.0
        service.alive()
    assert 0 < len(sent(manager)) < 2_000
