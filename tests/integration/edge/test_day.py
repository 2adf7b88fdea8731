"""Forty minutes of the simulated day of ``python -m tests.bench.edge.day``, with a process that is killed often."""

from pathlib import Path

from tests.bench.edge.day import day, judge


def test_no_answer_is_lost_or_doubled_and_no_budget_overspent(tmp_path: Path) -> None:
    found = judge(*day(tmp_path, 2_400.0, seed=3, life_s=250.0))
    assert found["faults"] == {}
    assert found["lives"] >= 4, "it was killed"
    assert found["answers"] + found["in hand when the process was killed"] == found["clips"] > 150
    assert 0 < found["through the cloud"] < found["answers"], "the link was there, and it was not"
    assert found["uploads"] >= 2 and found["epsilon spent"] <= 12
    assert found["student at the end"].startswith("final")
