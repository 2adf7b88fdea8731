"""The experiment on generation with tiny cells: resumed from its files, its tables complete, its pictures drawn."""

import json
from pathlib import Path

import pytest
import typer

from isthmus.data.traces import TraceError
from isthmus.experiments.generation.cells import GOALS, Cell, run
from isthmus.experiments.generation.cli import generation
from isthmus.experiments.generation.comparison import beside_papers, cells_of, median_of, of


def test_every_question_has_its_table_and_a_second_run_computes_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [
        f"2023-11-16 18:{second // 60:02}:{second % 60:02}.0,{40 * second + 80},{second % 9 + 1}"
        for second in range(60)
    ]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    for _ in range(2):
        generation(tmp_path / "out", trace, seeds="0", loads="2", policies="static,fused,baton,orca", requests=12)
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    page = (tmp_path / "out" / "result.md").read_text()
    for heading in (
        "`lmaas`, load 2",
        "`chat`, load 2",
        "`trace`, load 0.7",
        "80 % of the requests",
        "Predictors",
        "Prompts that begin with 200 tokens",
        "Preempted requests",
        "Four replicas",
        "Two",
    ):
        assert heading in page
    assert {path.stem for path in (tmp_path / "out" / "pictures").iterdir()} == {
        "goodput", "response", "first-token", "occupancy", "waste", "fairness", "prefix", "prediction", "placement",
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "result.json").read_text())["cells"]
    assert (median_of(of(found, "policy", "lmaas", 2.0, "fused"), "goodput") or 0) <= 1
    shared, alone = (of(found, "prefix", "lmaas", 2.0, name) for name in ("shared", "each alone"))
    assert (median_of(shared, "shared_share") or 0) > 0.2 and median_of(alone, "shared_share") == 0
    papers = {row[0]: row for row in beside_papers(found)}
    assert "times Orca's throughput" in papers["BATON"][2]
    assert papers["JITServe"][2] == "not run" == papers["Magnus"][2]
    cells = [of(found, "policy", "lmaas", 2.0, name)[0] for name in ("baton", "orca")]
    assert papers["BATON"][2].startswith(f"{cells[0]['tokens_per_s'] / cells[1]['tokens_per_s']:.2f} times")


def test_what_cannot_be_simulated_is_refused_before_anything_is(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens\n")
    with pytest.raises(TraceError, match="no column GeneratedTokens"):
        generation(tmp_path / "out", tmp_path / "trace.csv", seeds="0", loads="2", policies="fused", requests=12)
    for loads in ("0", "1,-2", ""):
        with pytest.raises(typer.BadParameter, match="numbers above 0"):
            generation(tmp_path / "out", None, seeds="0", loads=loads, policies="fused", requests=12)
    assert not (tmp_path / "out").exists()


def test_a_cell_s_figures_follow_from_it_alone() -> None:
    cell = Cell("prediction", "lmaas", 1.0, 3, "nearest", 30)
    assert run(cell) == run(cell)
    keys = [each.key for each in cells_of(["fused"], [0.9, 1.2], [0, 1], 30, None)]
    assert len(set(keys)) == len(keys) and all("/" not in key for key in keys)
    assert len(GOALS) == 2
