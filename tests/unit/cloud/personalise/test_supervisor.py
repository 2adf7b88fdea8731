"""Whether a worker ended by its own fault, and which job it had taken."""

import signal
from pathlib import Path

import pytest

from isthmus.cloud.personalise.supervisor import by_own_fault, out_of_memory_kills
from isthmus.cloud.personalise.worker import TakenFile


@pytest.mark.parametrize(
    ("code", "kills", "fault"),
    [
        (0, 0, False),
        (1, 0, True),
        (-signal.SIGKILL, 0, False),
        (-signal.SIGKILL, 1, True),
        (-signal.SIGTERM, 1, False),
        (-signal.SIGSEGV, 0, True),
        (-signal.SIGABRT, 0, True),
    ],
)
def test_a_crash_is_told_from_a_kill(code: int, kills: int, fault: bool) -> None:
    assert by_own_fault(code, kills) is fault


def test_the_kernels_count_is_read_or_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = tmp_path / "memory.events"
    monkeypatch.setattr("isthmus.cloud.personalise.supervisor._KILL_COUNTERS", (events,))
    assert out_of_memory_kills() == 0
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert out_of_memory_kills() == 2


def test_the_taken_job_is_remembered(tmp_path: Path) -> None:
    taken = TakenFile(tmp_path / "worker.job")
    assert taken.read() is None
    taken.write("job1")
    assert taken.read() == "job1"
    taken.clear()
    taken.clear()
    assert taken.read() is None
    taken.path.write_bytes(b"\xff\xfe")
    assert taken.read() is None
    taken.path.unlink()
    taken.path.mkdir()
    taken.write("job2")
    assert taken.read() is None
