"""Live answers over a late link: the device answers in its budget, counts late answers, and replaces the link."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.edge.agent.live import LiveAnswers, Worker
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.capture.sources import replay
from isthmus.edge.link.interface import MemoryInferSession, MemoryLink
from isthmus.proto.errors import TooLate
from isthmus.proto.messages import InferReply
from tests.rigs.edge.device import device


class LateSession(MemoryInferSession):
    """While the link is ``slow`` answers come 2 s late; while it is ``silent`` they never come."""

    def __init__(self, link: "LateLink", student_id: str) -> None:
        super().__init__(link, student_id)
        self._late_link = link
        self._due: list[tuple[int, float]] = []

    def receive(self, sequence: int, *, timeout_s: float) -> InferReply:
        if self._late_link.state == "quick":
            return super().receive(sequence, timeout_s=timeout_s)
        self._late_link.clock.sleep(timeout_s)
        if self._late_link.state == "slow":
            self._due.append((sequence, self._late_link.clock.now_s + 2.0))
        raise TooLate(f"no answer within {timeout_s:g} s")

    def late(self) -> list[tuple[int, float]]:
        now_s = self._late_link.clock.now_s
        came = [(sequence, now_s - at_s) for sequence, at_s in self._due if at_s <= now_s]
        self._due = [each for each in self._due if each[1] > now_s]
        return came


class LateLink(MemoryLink):
    state = "quick"
    clock: Any = None

    def open_infer(self, student_id: str, *, timeout_s: float) -> LateSession:
        super().open_infer(student_id, timeout_s=timeout_s)
        return LateSession(self, student_id)


def test_a_late_cloud_costs_no_clip_its_answer(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    link = LateLink(cloud)
    runtime, _, clock = device(tmp_path / "device", cloud, plan, link=link)
    link.clock = clock
    runtime.run()
    live = LiveAnswers(runtime, Worker(), 0.5, clock.sleep)
    taken = next(replay(plan.test[:1], runtime.spec, clock, runtime.damage))

    def answered(state: str) -> tuple[bool, float]:
        """Answer a clip, then wait for 3 s; return whether the cloud answered, and the seconds that it took."""
        link.state, began_s = state, clock.now_s
        found = live.answer(taken, 0.5)
        took_s = clock.now_s - began_s
        assert found.answer.predicted is not None
        clock.sleep(3.0)
        return found.setting is not None, took_s

    assert answered("quick")[0]
    for state in ("slow", "slow", "silent", "silent"):
        by_cloud, took_s = answered(state)
        assert not by_cloud
        assert took_s == pytest.approx(0.5, abs=0.01), "the own answer is given when the time is up"
    assert live.memory.late == 2
    assert link.renewals >= 1, "a connection that owes an answer for 3 s is replaced"
    assert answered("quick")[0], "the cloud answers the first clip after that"
    assert live.memory.asked == 6 and live.memory.in_time == 2
    assert live.memory.lost >= 1
    live.close()


def test_a_device_that_asks_nobody_sends_no_features(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    config = RunConfig("kiosk", seed=1, ask_cloud=False)
    runtime, _, clock = device(tmp_path / "device", cloud, plan, config=config)
    runtime.run()
    live = LiveAnswers(runtime, Worker(), 0.5, clock.sleep)
    taken = next(replay(plan.test[:1], runtime.spec, clock, runtime.damage))
    for _ in range(3):
        found = live.answer(taken, 0.5)
        assert found.setting is None and found.answer.predicted is not None
    assert live.memory.asked == 0 and live.memory.worth is None
    assert runtime.link.traffic.up_bytes["inference"] == 0
    live.close()


def test_a_new_student_that_ends_the_process_is_replaced_at_the_third_start(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = students.cloud()
    runtime, _, _ = device(tmp_path, cloud, plan)
    assert runtime.run().active_id == "final"
    runtime.close()
    for _ in range(2):
        again, _, _ = device(tmp_path, cloud, plan)
        again.run()
        assert again.student_to_use() == "final"  # and the process ends without a word
    third, state, clock = device(tmp_path, cloud, plan)
    third.run()
    live = LiveAnswers(third, Worker(), 0.5, clock.sleep)
    taken = next(replay(plan.test[:1], third.spec, clock, third.damage))
    assert live.answer(taken, 0.5).answer.predicted is not None
    assert (third.state.active_id, third.state.refused_id) == ("base", "final")
    assert "ended 2 times" in third.state.verdict
    assert state.agent().active_id == "base"
    live.close()
    third.close()


def test_a_slow_student_is_replaced_while_the_device_runs(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    runtime, _, clock = device(tmp_path, cloud, plan, cpu_clock=iter(np.arange(0.0, 9_999.0, 0.1)).__next__)
    runtime.run(until=Phase.ENCODE)
    live = LiveAnswers(runtime, Worker(), 0.5, clock.sleep)
    taken = next(replay(plan.test[:1], runtime.spec, clock, runtime.damage))
    for _ in range(20):
        live.answer(taken, 0.5)
    assert runtime.slot.trial_of("base") is None, "it is known to be good"
    assert runtime.run().active_id == "final"
    runtime.cpu_clock = iter(np.arange(0.0, 9_999.0, 0.35)).__next__
    for _ in range(5):
        assert live.answer(taken, 0.5).answer.predicted is not None
    assert runtime.state.active_id == "base"
    assert "350 ms per clip, and the student before took 100 ms" in runtime.state.verdict
    assert live.answer(taken, 0.5).answer.predicted is not None
    live.close()
    runtime.close()
