"""The grid and its methods: cells made once by any number of processes, the planner replayed, figures that add up."""

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.warmup.compare import figures
from isthmus.cloud.warmup.compare.claims import Cells
from isthmus.cloud.warmup.compare.comparison import METHODS, Measured, by_method, compared, replayed, with_time_share
from isthmus.cloud.warmup.compare.grid import Grid, markdown
from isthmus.cloud.warmup.planner import BudgetTooSmall, Cost, Plan
from isthmus.data.images import LabelledImages
from isthmus.data.made_by import code
from tests.rigs.elastic.warmup import NUMBERS, bright_or_dark, quick, subject

VANILLA = Measured({0: 0.9, 8: 0.6, 16: 0.3}, {0: 0.88, 8: 0.58, 16: 0.28})
TUNED = {
    0: Measured({0: 0.89, 8: 0.62, 16: 0.31}, {0: 0.87, 8: 0.6, 16: 0.3}, 100.0),
    8: Measured({0: 0.88, 8: 0.85, 16: 0.5}, {0: 0.86, 8: 0.82, 16: 0.48}, 80.0),
    16: Measured({0: 0.6, 8: 0.7, 16: 0.8}, {0: 0.59, 8: 0.69, 16: 0.78}, 60.0),
}
SOUP = Measured({0: 0.5, 8: 0.87, 16: 0.6}, {0: 0.5, 8: 0.84, 16: 0.6})


def plan(middle: int = 8) -> Plan:
    return Plan(middle, {number: Cost(of.seconds, 10) for number, of in TUNED.items()})


def test_each_method_takes_the_best_by_profiling_and_is_judged_on_the_test_set() -> None:
    accuracy = by_method(VANILLA, TUNED, [8, 16], {"soup-8": SOUP})
    assert list(accuracy) == list(METHODS)
    assert accuracy["clipper"] == {0: 0.88, 8: 0.88, 16: 0.88}
    assert accuracy["otas"] == VANILLA.test
    assert accuracy["maxprune"] == TUNED[16].test
    assert accuracy["exhaustive"] == accuracy["prodigy"] == {0: 0.88, 8: 0.82, 16: 0.78}
    assert accuracy["prodigy+soups"] == {0: 0.88, 8: 0.84, 16: 0.78}


def test_what_is_compared_adds_up() -> None:
    done = replayed(plan(), TUNED)
    assert [one.number for one in done.models] == [8, 16]
    accuracy = by_method(VANILLA, TUNED, [8, 16], {})
    found = compared(accuracy, done, TUNED)
    assert found["cost_share"] == pytest.approx(140 / 240)
    assert found["won_back"]["prodigy"] == pytest.approx({8: 0.24 / 0.30, 16: 0.50 / 0.60})
    assert found["cost_at_0"]["prodigy"] == 0 and found["cost_at_0"]["maxprune"] == pytest.approx(0.29)
    assert found["of_exhaustive"]["prodigy"] == 1
    assert found["vanilla_loses_most"] == pytest.approx(0.6)
    assert found["prediction_errors"] == {8: 0.0, 16: 0.0}


def test_a_replay_keeps_the_time_budget() -> None:
    with pytest.raises(BudgetTooSmall):
        with_time_share(plan(0), TUNED, 0.5)
    cheap = with_time_share(plan(0), TUNED, 0.8)
    assert [one.number for one in replayed(cheap, TUNED).models] == [0, 16]
    assert [one.number for one in replayed(with_time_share(plan(0), TUNED, 1.0), TUNED).models] == [0, 8, 16]
    slow = {**TUNED, 16: replace(TUNED[16], seconds=200.0)}
    given_up = replayed(replace(plan(0), time_budget_s=170.0), slow)
    assert [one.number for one in given_up.models] == [0] and given_up.spent_s == 170.0


def _make(folder: str, name: str, holding: Any, release: Any, made: Any) -> None:
    def value() -> dict[str, Any]:
        holding.set()
        release.wait(300)
        return {"from": "child"}

    made.value = Cells(Path(folder), "k").make(name, value)


def test_a_cell_is_made_once_whoever_asks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    holding, release, made = context.Event(), context.Event(), context.Value("b", 0)
    child = context.Process(target=_make, args=(str(tmp_path), "a", holding, release, made))
    child.start()
    assert holding.wait(300)
    cells = Cells(tmp_path, "k")
    assert not cells.make("a", lambda: pytest.fail("another process is at it"))
    assert cells.make("b", lambda: {"from": "here"})
    release.set()
    child.join(60)
    assert made.value == 1
    assert cells.make("a", lambda: pytest.fail("it is made"))
    assert cells.get("a") == {"from": "child"} and cells.get("b") == {"from": "here"} and cells.get("c") is None


def test_a_claim_ends_with_what_failed_and_foreign_cells_are_refused(tmp_path: Path) -> None:
    cells = Cells(tmp_path, "k")

    def breaks() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.make("a", breaks)
    assert cells.make("a", lambda: {"x": 1})
    with pytest.raises(ValueError, match="another measurement"):
        Cells(tmp_path, "other").get("a")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        cells.get("a")


def test_a_grid_is_measured_resumed_reported_and_drawn(tmp_path: Path) -> None:
    grid = Grid(
        tmp_path, subject(), bright_or_dark(10, 7), NUMBERS, quick(epochs=1), seeds=(0, 1), middle=4, time_share=50.0
    )
    lines: list[str] = []

    class Killed(BaseException):
        pass

    def kill(line: str) -> None:
        lines.append(line)
        if line == "seed 1, number 4":
            raise Killed

    with pytest.raises(Killed):
        grid.run(report=kill)
    assert grid.run(report=lines.append) is not None
    assert [line for line in lines if line.startswith("seed")] == [
        *(f"seed 0, number {number}" for number in NUMBERS),
        "seed 1, number 0",
        "seed 1, number 4",
        "seed 1, number 4",
        "seed 1, number 8",
    ]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [seed["tuned"] for seed in result["seeds"]] == [[4, 8], [4, 8]]
    assert result["code"] == [code()]
    for seed in result["seeds"]:
        assert set(seed["accuracy"]) == set(METHODS)
        assert set(seed["grid"]) == set(seed["grid"]["0"]) == {"0", "4", "8"}
        assert len(seed["soups"]["found"]) == 3
        assert seed["planned_s"] > 0 and seed["cost_share"] > 0
    page = markdown(result)
    assert all(f"| {method} |" in page for method in METHODS) and "smallest share won back" in page
    assert len(figures.draw(result, tmp_path / "pictures")) == 4
    again: list[str] = []
    assert grid.run(report=again.append) == result
    assert not any(line.startswith("seed") for line in again)


def test_a_grid_needs_number_0_and_every_class_among_the_test_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="number 0 must be"):
        Grid(tmp_path, subject(), bright_or_dark(10, 7), (4, 8), quick())
    test = bright_or_dark(10, 7)
    dark = LabelledImages(test.pictures_NHWC[::2], test.labels_N[::2])
    with pytest.raises(ValueError, match="the test set holds no picture of bright"):
        Grid(tmp_path, subject(), dark, NUMBERS, quick())


def test_a_time_share_that_does_not_hold_both_ends_is_refused_and_may_be_raised(tmp_path: Path) -> None:
    grid = Grid(tmp_path, subject(), bright_or_dark(10, 7), NUMBERS, quick(epochs=1), seeds=(0,), time_share=0.01)
    with pytest.raises(BudgetTooSmall, match=r"--time-share 0\.01"):
        grid.run()
    lines: list[str] = []
    assert replace(grid, time_share=50.0).run(report=lines.append) is not None
    assert not any(line.startswith("seed") for line in lines)


def test_the_last_process_to_end_writes_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(
        tmp_path, subject(), bright_or_dark(10, 7), NUMBERS, quick(epochs=1), seeds=(0,), middle=4, time_share=50.0
    )
    real = Cells.make

    def elsewhere(cells: Cells, name: str, made: Callable[[], dict[str, Any]]) -> bool:
        if name != missing:
            real(cells, name, made)
        return False  # another process was at every cell, and has made most of them by now

    monkeypatch.setattr(Cells, "make", elsewhere)
    lines: list[str] = []
    missing = "tuned-0-8"
    assert grid.run(report=lines.append) is None
    assert lines[-1].startswith("other processes are still making")
    missing = ""
    assert grid.run() is not None
