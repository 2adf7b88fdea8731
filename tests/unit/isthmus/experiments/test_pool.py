"""Cells of a study are made in several processes; a failed one does not stop the others."""

import os
from pathlib import Path

import pytest

from isthmus.experiments.personal.cells.pool import CellsFailed, run_all


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_task_is_named_and_the_others_are_finished(tmp_path: Path, workers: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(f"target-{name}")
    tasks = [str(tmp_path / name) for name in ("a", "missing", "b")]
    lines: list[str] = []
    with pytest.raises(CellsFailed, match=r"1 of 3 links failed; run again to retry them: .*missing"):
        run_all(os.readlink, tasks, workers=workers, report=lines.append, what="links")
    assert {"target-a", "target-b"} < set(lines)
    assert [line.partition(":")[0] for line in lines if line.startswith("FAILED")] == [f"FAILED {tasks[1]}"]
