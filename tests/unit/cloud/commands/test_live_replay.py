"""A replay in real time, with the test's own clock and an executor that answers by a rule; and its refusals."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app
from isthmus.cloud.commands.live_replay import LiveTask, LiveWorld, open_live
from isthmus.cloud.elastic.model.executor import Item
from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import serve
from isthmus.cloud.elastic.serve.traced import serve_at_once
from isthmus.cloud.elastic.tasks.task import Task, TaskSpec, TaskWeights
from isthmus.data.images import LabelledImages

PROFILE = paper_profile()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_s += seconds


class RuleExecutor:
    """Takes as long as the profile says, and assigns every bright picture to class 1."""

    def __init__(self, clock: Clock, slowness: float = 1.0) -> None:
        self.clock = clock
        self.slowness = slowness
        self.ran: list[tuple[int, int]] = []

    def run(self, items: Sequence[Item], gamma: int) -> list[np.ndarray]:
        self.clock.sleep(self.slowness * PROFILE.batch_time_s(gamma, len(items)))
        self.ran.append((gamma, len(items)))
        return [np.array([0.5, float(item.image.mean() > 100)]) for item in items]


def world(clock: Clock, executor: RuleExecutor) -> LiveWorld:
    pictures = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 200, 200)])
    labelled = LabelledImages(pictures, np.array([0, 1, 0]))
    weights = TaskWeights(np.zeros((2, 4), np.float32), np.zeros(2, np.float32), {})
    tasks = {name: LiveTask(Task(TaskSpec(name, ("dark", "bright")), weights), labelled) for name in PROFILE.accuracy}
    return LiveWorld(executor, tasks, clock=clock, sleep=clock.sleep)


def queries(count: int, each_s: float) -> list[Query]:
    return [Query(id, "CIFAR10", id * each_s, id * each_s + 0.6, 1.0) for id in range(count)]


def test_labels_say_what_was_right_and_the_clock_what_was_in_time() -> None:
    clock = Clock()
    executor = RuleExecutor(clock)
    live = world(clock, executor)
    live.begin(PROFILE.gammas)
    assert live.now_s() == 0 and {gamma for gamma, _ in executor.ran} == set(PROFILE.gammas)
    run = serve(Engine(PROFILE, make_policy("priced", PROFILE)), queries(9, 0.1), live)
    right, wrong = Outcome.CORRECT_IN_TIME, Outcome.WRONG_IN_TIME
    assert run.outcomes == [right, right, wrong] * 3
    assert run.utility == 6


def test_a_machine_slower_than_its_profile_answers_late_and_goes_on() -> None:
    clock = Clock()
    live = world(clock, RuleExecutor(clock, slowness=30.0))
    run = serve(Engine(PROFILE, make_policy("priced", PROFILE)), queries(200, 0.002), live)
    assert None not in run.outcomes
    assert run.share(Outcome.LATE) > 0.1 and run.share(Outcome.EVICTED) > 0.1


def test_an_executor_that_breaks_fails_its_batch_and_is_heard() -> None:
    class Broken(RuleExecutor):
        def run(self, items: Sequence[Item], gamma: int) -> list[np.ndarray]:
            raise MemoryError("out of memory")

    clock = Clock()
    engine = Engine(PROFILE, make_policy("priced", PROFILE))
    with pytest.raises(MemoryError):
        serve(engine, queries(3, 0.0), world(clock, Broken(clock)))
    assert engine.outcomes[Outcome.FAILED] == 3 and engine.running == 0


def test_a_number_type_that_cannot_be_run_is_told() -> None:
    with pytest.raises(ValueError, match="unknown"):
        open_live(PROFILE, model="x", tasks=Path(), data=Path(), pixels=None, device="cpu", limit=None, seed=0)


def test_live_asks_for_all_it_needs(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    key = replace(PROFILE.key, number_type="float32", threads=0)
    profile.write_text(replace(PROFILE, key=key).to_json(), encoding="utf-8")
    for args in (
        ["--live"],
        ["--live", "--profile", str(profile), "--model", str(tmp_path / "none.safetensors")],
        ["--live", "--profile", str(profile), "--model", "none.safetensors", "--tasks", ".", "--data", "."],
    ):
        result = CliRunner().invoke(app, ["replay", "synthetic", *args])
        assert result.exit_code == 1 and "isthmus elastic replay:" in result.output


def test_a_simulated_replay_at_a_live_pace_tells_it_again(tmp_path: Path) -> None:
    sums = {}
    for pace in ("1", "1.5"):
        out = tmp_path / f"{pace}.json"
        asked = ["--policy", "fixed:0", "--duration-s", "3", "--pace", pace, "--out", str(out)]
        assert CliRunner().invoke(app, ["replay", "synthetic", *asked]).exit_code == 0
        sums[pace] = json.loads(out.read_text(encoding="utf-8"))
        assert sums[pace]["took"] == pytest.approx(float(pace))
    assert sums["1.5"]["expected_utility"] < 0.9 * sums["1"]["expected_utility"]
    refused = CliRunner().invoke(app, ["replay", "synthetic", "--live", "--pace", "1.5"])
    assert refused.exit_code == 1 and "--pace" in refused.output


class Bright:
    """Answers at once, by brightness. ``breaks``: fails its first batch."""

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks
        self.sizes: list[int] = []

    def run(self, items: Sequence[Item], gamma: int) -> list[np.ndarray]:
        if self.breaks:
            self.breaks = False
            raise MemoryError
        self.sizes.append(len(items))
        return [np.array([0.5, float(item.image.mean() > 100)], np.float32) for item in items]


def test_several_executors_serve_the_same_trace_in_real_time() -> None:
    clock = Clock()
    of = world(clock, RuleExecutor(clock))
    executors = [Bright(), Bright(breaks=True)]
    asked = [replace(query, deadline_s=query.arrival_s + 60.0) for query in queries(60, 0.002)]
    engine = Engine(PROFILE, make_policy("priced", PROFILE), executors=2, adapts=False)
    run = serve_at_once(engine, asked, executors, of.asked)
    right, wrong = Outcome.CORRECT_IN_TIME, Outcome.WRONG_IN_TIME
    assert run.outcomes == [right, right, wrong] * 20 and run.utility == 40
    assert (
        sum(batch.size for batch in run.batches)
        == 60
        == len(run.waits_s)
        == sum(map(sum, (e.sizes for e in executors)))
    )
    assert sorted(batch.size for batch in run.batches) == sorted(size for each in executors for size in each.sizes)
    best = max(PROFILE.accuracy["CIFAR10"].values())
    assert 0 < run.expected_utility <= 60 * best + 1e-9
    assert engine.outcomes[Outcome.FAILED] == 0


def test_queries_that_come_too_late_for_several_executors_are_evicted() -> None:
    clock = Clock()
    asked = [replace(query, deadline_s=query.arrival_s + 1e-4) for query in queries(5, 0.01)]
    engine = Engine(PROFILE, make_policy("priced", PROFILE), executors=2)
    run = serve_at_once(engine, asked, [Bright(), Bright()], world(clock, RuleExecutor(clock)).asked)
    assert run.outcomes == [Outcome.EVICTED] * 5 and not run.batches and run.utility == 0
