"""The measuring commands run on sizes too small to measure anything, and their reports are well-formed."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.distill.selection import STRATEGIES
from tests.bench.distill.selection import SETS, greedy
from tests.bench.edge.soak import slope_per_hour
from tests.bench.harness import Report, Spread, interleaved
from tests.rigs.project import bench


def measured(out: Path, name: str, *options: str) -> dict[str, Any]:
    """Run a command, and check what all of them report."""
    found = bench.measured(out, name, *options)
    assert found["machine"]["threads"] == 1
    assert {"load_average_before", "others_share", "quiet"} <= set(found["load"])
    return found


def test_every_bench_that_a_page_names_is_there_or_in_the_folder_of_its_room() -> None:
    root = Path(__file__).parents[3]
    found = 0
    for page in (root / "README.md", *root.glob("docs/**/*.md")):
        text = page.read_text()
        for name in re.findall(r"python -m tests\.bench\.([a-z0-9_.]*[a-z0-9_])", text):
            found += 1
            there = root / "tests" / "bench" / f"{name.replace('.', '/')}.py"
            moved = [*root.glob(f"tests/bench/*/{name}.py"), *root.glob(f"tests/bench/{name.replace('_', '/', 1)}.py")]
            gone = "That program is no longer there" in text
            assert there.is_file() or len(moved) == 1 or gone, f"{page.name} names tests.bench.{name}"
    assert found > 50


def test_selection(tmp_path: Path) -> None:
    found = measured(tmp_path, "distill.selection", "--samples", "3000", "--prototypes", "8", "--repeats", "1")
    assert {row["set"] for row in found["rows"]} == set(SETS)
    assert {"isthmus", "faiss", "scikit-learn", *STRATEGIES} - {"cosine"} <= {row["what"] for row in found["rows"]}
    rivals = ("isthmus", "faiss", "scikit-learn")
    smooth = [row for row in found["rows"] if row["set"] == "smooth" and row["what"] in rivals]
    assert all(row["same_as_ours"] > 0.95 for row in smooth), "all three select the same if there are no ties"


def test_sharded_selection(tmp_path: Path) -> None:
    few = ("--samples", "9000", "--shard-samples", "2000", "--prototypes", "6", "--alone", "2", "--cpus", "1")
    found = measured(tmp_path, "distill.sharded_selection", "--folder", str(tmp_path / "set"), *few)
    whats = [row["what"] for row in found["rows"]]
    assert whats[:2] == ["shard 0 alone", "shard 4 alone"] and len(whats) == 6
    assert found["config"]["shards"] == 5 and "picks are equal" in found["notes"][0]


def test_teacher_cache(tmp_path: Path) -> None:
    rows = measured(tmp_path, "distill.teacher_cache", "--presets", "tiny", "--clips", "18", "--repeats", "1")["rows"]
    assert [row["what"] for row in rows] == ["bare forward", "cache"]
    assert rows[0]["share_of_bare"] == 1
    assert all(row["clips_s"] > 0 for row in rows)


def test_training(tmp_path: Path) -> None:
    few = ("--presets", "tiny", "--repeats", "1", "--most-others", "0", "--each-s", "0.1")
    rows = measured(tmp_path, "distill.training", *few)["rows"]
    assert [row["others"] for row in rows] == [0] * 5
    assert all(row["seconds"]["median"] > 0 for row in rows)
    assert [row["times_floor"] is not None for row in rows] == [True] * 2 + [False] * 3


def test_the_growth_of_a_soak_is_a_slope_with_its_error() -> None:
    at_s = np.arange(0, 3600, 10.0)
    assert slope_per_hour(at_s, 7e6 + 5e6 * at_s / 3600) == pytest.approx((5e6, 0), abs=1)
    still = np.random.default_rng(0).normal(250e6, 1e6, len(at_s))
    slope, error = slope_per_hour(at_s, still)
    assert abs(slope) < 3 * error < 3e6
    with pytest.raises(ValueError, match="9 samples are too few"):
        slope_per_hour(at_s[:9], still[:9])


def test_person(tmp_path: Path) -> None:
    rows = measured(tmp_path, "edge.person", "--clips", "20", "--width", "8", "--repeats", "1", "--answers", "2")[
        "rows"
    ]
    assert {row["what"] for row in rows} >= {"estimate", "answer by habits", "answer by the offset"}
    assert all(row["cpu_ms"]["median"] > 0 for row in rows)


def test_encoder(tmp_path: Path) -> None:
    rows = measured(tmp_path, "edge.encoder", "--presets", "tiny", "--repeats", "1")["rows"]
    engines = {"torch eager", "ONNX Runtime float32", "ONNX Runtime int8"}
    assert {(row["encoder"], row["engine"]) for row in rows} == {(e, on) for e in ("audio", "visual") for on in engines}
    assert all(row["operations"] > 1e6 and row["cpu_s"]["median"] > 0 for row in rows)


def test_stream(tmp_path: Path) -> None:
    options = ("--frames", "5", "--repeats", "1", "--ratios", "3", "--number-types", "int8")
    rows = measured(tmp_path, "cloud.stream", *options)["rows"]
    assert {(row["server"], row["in_flight"]) for row in rows} == {(s, n) for s in ("cloud", "echo") for n in (1, 64)}
    assert all(row["p50_s"]["median"] <= row["p99_s"]["median"] for row in rows)
    assert all(row["reply_bytes"] == row["request_bytes"] for row in rows if row["server"] == "echo")


def test_load(tmp_path: Path) -> None:
    options = ("--in-flight", "1,8", "--duration-s", "0.2", "--repeats", "1", "--connections", "2", "--tune", "4")
    found = measured(tmp_path, "cloud.load", *options, "--dynamic", "dynamic:4:5", "--others", "fixed:0")
    policies = {"ours": "priced", "dynamic batching": "dynamic:4:5", "fixed:0": "fixed:0", "echo": "echo"}
    assert {row["target"]: row["policy"] for row in found["rows"]} == policies
    assert len(found["rows"]) == 8 and all(row["answered_per_s"]["median"] > 0 for row in found["rows"])
    assert list(found["config"]["tried"]) == ["ours", "dynamic batching"]


def test_connection(tmp_path: Path) -> None:
    options = ("--quiet-s", "0.1", "--repeats", "0", "--reconnects", "2", "--cuts", "1")
    rows = {row["what"]: row for row in measured(tmp_path, "edge.connection", *options)["rows"]}
    assert list(rows) == ["stream to a dead server", "channel replaced", "connection cut", "quiet stream"]
    assert rows["quiet stream"]["connections"] == 1 and not rows["quiet stream"]["broken"]


def test_footprint(tmp_path: Path) -> None:
    """Uses the tests' environment, because the device's may be missing. It does not measure a device."""
    options = ("--presets", "tiny", "--edge-python", sys.executable)
    sizes = {row["what"]: row.get("bytes", 0) for row in measured(tmp_path, "edge.footprint", *options)["rows"]}
    assert sizes["install, .[edge]"] > 1e8
    for who in ("isthmus edge", "torch eager"):
        assert sizes[f"memory, {who}, encoding, tiny"] > sizes[f"memory, {who}, imported, tiny"] > 1e7


def test_planning(tmp_path: Path) -> None:
    found = measured(tmp_path, "elastic.planning", "--batches", "6", "--size", "2", "--repeats", "1")
    assert found["config"]["gammas"] == 8
    assert any(row["what"].startswith("priced") for row in found["rows"])


def test_elastic_front(tmp_path: Path) -> None:
    rows = measured(tmp_path, "elastic.front", "--queries", "3", "--repeats", "1")["rows"]
    ways = {"echo, same bytes", "MakeQuery, pixels", "MakeQuery, JPEG", "ModelInfer, pixels"}
    ways |= {"HTTP, pixels as binary data", "HTTP, pixels as JSON"}
    assert {row["way"] for row in rows} == ways
    assert all(0 < row["added_p50_s"]["median"] <= row["wall_p50_s"]["median"] for row in rows)


def test_elastic_engine(tmp_path: Path) -> None:
    rows = measured(tmp_path, "elastic.engine", "--images", "16", "--repeats", "1", "--batches", "1,4")["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    assert all(row["share"]["median"] > 0 and 1 <= row["mean_batch_made"] <= row["batch"] for row in rows)


def test_model_sizes(tmp_path: Path) -> None:
    small = "vit_tiny_patch16_224,vit_small_patch16_224"
    rows = measured(tmp_path, "elastic.model_sizes", "--models", small, "--batch", "1", "--repeats", "1")["rows"]
    assert [row["model"] for row in rows] == small.split(",")
    assert 0 < rows[0]["cost"] < 1 == rows[1]["cost"] and all(row["load_bytes_per_s"] > 0 for row in rows)


def test_candidates_take_turns() -> None:
    order: list[str] = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3, warmups=1)
    assert "".join(order) == "abababab"
    assert timings["a"].wall_s.repeats == 3


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError):
        Spread.of([])


def test_a_report_says_whether_the_machine_was_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("nothing", {"size": 1}, rows=[{"what": "a"}], floors={"floor, s": 2.0}, notes=["a note"])
    report.finish({"what": lambda row: str(row["what"])}, tmp_path / "deep" / "found.json")
    found = json.loads((tmp_path / "deep" / "found.json").read_text())
    assert found["config"] == {"size": 1} and found["rows"] == [{"what": "a"}]
    shown = capsys.readouterr().out
    assert ("BUSY" in shown) is not found["load"]["quiet"]


def test_the_greedy_choice_of_the_rivals_takes_nothing_twice() -> None:
    assert greedy(np.array([[0, 1, 2, 3], [1, 0, 2, 3]]), 4, 2).tolist() == [0, 1, 2, 3]


def test_workers(tmp_path: Path) -> None:
    options = ("--jobs", "20", "--workers", "2", "--kill-every-s", "3", "--lease-s", "2")
    (row,) = measured(tmp_path, "cloud.workers", *options)["rows"]
    assert (row["jobs"], row["done_once"], row["paused_worker"]["row_unchanged"]) == (20, 20, True)
    assert row["taken_again_after_s"] > 0


def test_devices(tmp_path: Path) -> None:
    options = ("--devices", "8", "--connected", "4", "--jobs-per-s", "2", "--asks-per-s", "5", "--duration-s", "2")
    found = measured(tmp_path, "cloud.devices", *options, "--more-calls", "40")
    rows = found["rows"]
    assert [row["call"] for row in rows] == ["StartPersonalisation", "DescribeStudent"]
    assert all(row["sent"] > 0 and row["errors"] == {} for row in rows)
    memory = rows[0]["memory"]
    assert (memory["calls"], memory["failed"], len(memory["own_bytes"])) == (40, 0, 21)
    assert "bytes per call" in found["notes"][0]


def test_rolling(tmp_path: Path) -> None:
    (row,) = measured(tmp_path, "cloud.rolling", "--callers", "2", "--rounds", "1")["rows"]
    assert row["replaced"] == 2 and row["answered"] > 0 and (row["failed"], row["errors"]) == (0, {})
    assert row["asked_again"] <= 2 * 2, "each caller has one call at a time, which meets each server's end once"


def test_executors(tmp_path: Path) -> None:
    options = ("--executors", "2", "--loads", "1", "--duration-s", "1", "--seeds", "1")
    (row,) = measured(tmp_path, "elastic.executors", *options)["rows"]
    assert 0 < row["share_of_bound"]["pets"] <= row["share_of_bound"]["priced"] <= 1


def test_uneven(tmp_path: Path) -> None:
    options = ("--factors", "3", "--loads", "1.5", "--duration-s", "2", "--seeds", "2", "--policies", "otas")
    (row,) = measured(tmp_path, "elastic.uneven", *options)["rows"]
    assert 0 < max(row["one"]) <= 1 and 0 < max(row["own"]) <= 1 and row["more"] > 0


def test_noisy(tmp_path: Path) -> None:
    found = measured(tmp_path, "cloud.noisy", "--rate", "20", "--quota", "5", "--duration-s", "1", "--rounds", "1")
    rows = {row["beside"]: row for row in found["rows"]}
    assert list(rows) == ["nobody", "the same load on an echo", "the tenant within its quota", "the noisy tenant"]
    assert all(row["errors"] == {} and row["latency_ms"]["p99"] > 0 for row in rows.values())
    answers = {kind: row["beside_load"]["outcomes"] for kind, row in rows.items()}
    assert answers["nobody"] == {} and answers["the same load on an echo"].keys() == {"ok"}
    assert answers["the noisy tenant"].keys() == {"Busy", "ok"}
