"""The demo's ledger: a finished stage is reused only while its key is the same and its result exists."""

from pathlib import Path

import pytest

from isthmus.demo.stages import StageLedger, key_of, only_one


def _make(result: Path, made: list[str]) -> None:
    made.append(result.name)
    result.write_text("done")


def test_a_finished_stage_is_taken_over_by_the_next_run(tmp_path: Path) -> None:
    made: list[str] = []
    result = tmp_path / "teacher"
    first = StageLedger(tmp_path / "stages.json").run("teacher", "k1", result, lambda: _make(result, made))
    second = StageLedger(tmp_path / "stages.json").run("teacher", "k1", result, lambda: _make(result, made))
    assert made == ["teacher"]
    assert (first.reused, second.reused) == (False, True)
    assert second.seconds == first.seconds


def test_another_key_or_a_missing_result_runs_it_again(tmp_path: Path) -> None:
    made: list[str] = []
    result = tmp_path / "teacher"
    for key in ("k1", "k2"):
        StageLedger(tmp_path / "stages.json").run("teacher", key, result, lambda: _make(result, made))
    result.unlink()
    StageLedger(tmp_path / "stages.json").run("teacher", "k2", result, lambda: _make(result, made))
    assert len(made) == 3


def test_a_stage_that_failed_is_not_done(tmp_path: Path) -> None:
    result = tmp_path / "half"
    ledger = StageLedger(tmp_path / "stages.json")
    ledger.run("student", "k1", result, lambda: _make(result, []))

    def fail() -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        ledger.run("student", "k2", result, fail)
    made: list[str] = []
    record = StageLedger(tmp_path / "stages.json").run("student", "k1", result, lambda: _make(result, made))
    assert made == ["half"]
    assert not record.reused


@pytest.mark.parametrize("content", ["", "not json", "[1, 2]", '[{"name": "teacher"}]', "{}"])
def test_a_damaged_ledger_counts_as_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "stages.json").write_text(content)
    made: list[str] = []
    result = tmp_path / "teacher"
    StageLedger(tmp_path / "stages.json").run("teacher", "k1", result, lambda: _make(result, made))
    assert made == ["teacher"]


def test_a_key_depends_on_every_part_and_on_nothing_else() -> None:
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len({key_of("a", 1), key_of("a", 2), key_of("b", 1), key_of("a1")}) == 4


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ValueError, match="another run uses"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        assert (tmp_path / "in-use").exists()
