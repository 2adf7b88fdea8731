"""Whether a worker ended by its own fault."""

import signal
from pathlib import Path

import pytest

from isthmus.cloud.personalise.supervisor import by_own_fault, out_of_memory_kills


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
