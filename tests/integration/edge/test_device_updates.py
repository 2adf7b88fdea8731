"""A device with a new student: the guard may refuse it, and habits change how its answers are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.edge.agent.device_run import DeviceRun, InferConfig
from isthmus.edge.agent.progress import Observer
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.commands.edge import app
from isthmus.edge.link.interface import MemoryCloud
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.proto.messages import PublicMeasure
from tests.rigs.edge.device import device


def answering_well_or_badly(students: Any, *, before: bool, after: bool) -> MemoryCloud:
    """A cloud whose students answer by the teacher's own head (well) or by a random one (badly); all of them verify."""
    cloud: MemoryCloud = students.cloud()
    for student_id, well in (("base", before), ("final", after)):
        files = students.files(student_id, 0)
        if well:
            files["local_head.onnx"] = files["teacher_head.onnx"]
        cloud.students[student_id] = students.signed(student_id, student_id, files)
        cloud.files.update({(student_id, name): data for name, data in files.items()})
    return cloud


def test_a_student_that_would_answer_worse_is_refused(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = answering_well_or_badly(students, before=True, after=False)
    decoded: list[int] = []
    watch = Observer(on_clip=lambda done, total: decoded.append(done))
    runtime, state, _ = device(tmp_path, cloud, plan, guard=True, observer=watch)
    agent_state = runtime.run()
    assert (agent_state.phase, agent_state.active_id, agent_state.refused_id) == (Phase.SERVE, "base", "final")
    assert "not good enough" in agent_state.verdict
    assert agent_state.failure == ""
    assert decoded.count(1) == 3, "base and interim made prototypes; the guard decoded once more, for the new student"
    current = runtime.slot.current()
    assert current is not None
    assert current.manifest.student_id == "base"
    assert runtime.slot.is_sound("final"), "it stays installed"
    report: Any = DeviceRun(runtime, state, plan, InferConfig(), cloud="memory").execute()
    guard = report["guard"]
    assert (report["students"]["final"], report["students"]["refused"]) == ("", "final")
    assert (guard["accepted"], guard["clips"], guard["reason"]) == (False, 8, agent_state.verdict)
    assert guard["estimates"]["old"]["joint"] > guard["estimates"]["new"]["joint"]
    truth = guard["true_accuracy"]
    assert guard["right"] == (truth["new"] < truth["old"])
    shown = CliRunner().invoke(app, ["status", "--state", str(tmp_path), "--json"])
    assert json.loads(shown.output)["refused_student"] == "final"
    assert "not good enough" in json.loads(shown.output)["verdict"]


def test_a_student_that_answers_as_well_is_taken_wherever_the_process_dies(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = answering_well_or_badly(students, before=True, after=True)

    class Killed(Exception):
        pass

    def die(stage: str) -> None:
        if stage in deadly:
            deadly.remove(stage)
            raise Killed

    for deadly in (["judge", "swap_final"], []):
        folder = tmp_path / str(len(deadly))
        while True:
            runtime, state, _ = device(folder, cloud, plan, guard=True, observer=Observer(on_stage=die))
            try:
                agent_state = runtime.run()
            except Killed:
                continue
            break
        assert (agent_state.active_id, agent_state.refused_id) == ("final", "")
        verdict = state.verdict()
        assert verdict is not None
        assert verdict.accept
        assert verdict.new["agreement"] == verdict.old["agreement"] == 1.0


def test_without_the_guard_any_student_is_taken_and_the_state_says_so(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = answering_well_or_badly(students, before=True, after=False)
    runtime, state, _ = device(tmp_path, cloud, plan, guard=False)
    agent_state = runtime.run()
    assert (agent_state.active_id, agent_state.verdict) == (
        "final",
        "not compared with the student before: the guard is off",
    )
    assert state.verdict() is None


def with_class_shares(students: Any) -> MemoryCloud:
    """A cloud whose base and final student state the class shares of their training."""
    cloud: MemoryCloud = students.cloud()
    for seed, kind in enumerate(("base", "interim", "final")):
        if kind != "interim":
            measured = PublicMeasure(100, 0.8, 0.5, (0.98, 0.01, 0.01))
            cloud.students[kind] = students.signed(kind, kind, students.files(kind, seed), measured)
    return cloud


@pytest.mark.parametrize("guard", [True, False])
def test_answers_know_the_users_habits_unless_that_is_unwanted(
    students: Any, plan: ClipPlan, tmp_path: Path, guard: bool
) -> None:
    cloud = with_class_shares(students)
    runtime, state, _ = device(tmp_path / "knowing", cloud, plan, guard=guard)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0,)), cloud="memory").execute()
    active = runtime.state.active_id
    habits = runtime.clips.habits(active)
    assert habits is not None
    assert report["habits"]["shares"] == habits.shares
    assert habits.clips == 8 and {"base", active} <= set(state.habits())
    for prediction in report["predictions"]:
        for answer_C in (prediction["probabilities"]["local"], prediction["probabilities"]["cloud"]["1"]):
            assert sum(answer_C) == pytest.approx(1, abs=1e-4)
    again = device(tmp_path / "knowing", cloud, plan, guard=guard)[0]
    assert again.clips.habits(active) == habits, "a restart knows them"

    off, off_state, _ = device(tmp_path / "not", cloud, plan, config=RunConfig("kiosk", seed=1, habits=False))
    plain: Any = DeviceRun(off, off_state, plan, InferConfig(ratios=(1.0,)), cloud="memory").execute()
    assert plain["habits"] is None and off_state.habits() == {}
    assert [one["local"] for one in plain["predictions"]] == [one["plain"] for one in plain["predictions"]]


def test_a_student_whose_answers_are_no_numbers_is_refused_and_no_habits_are_learned(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StudentEncoder.local_probabilities_of

    def broken(encoder: StudentEncoder, features: Any) -> Any:
        answers_NC = real(encoder, features)
        final = (
            len(features) > 1 and runtime.state.phase is Phase.JUDGE and encoder is not runtime.clips.encoder("base")
        )
        return np.full_like(answers_NC, np.nan) if final else answers_NC

    monkeypatch.setattr(StudentEncoder, "local_probabilities_of", broken)
    runtime, state, _ = device(tmp_path, with_class_shares(students), plan, guard=True)
    ended = runtime.run()
    assert (ended.active_id, ended.refused_id) == ("base", "final")
    assert "cannot be judged" in ended.verdict
    assert set(state.habits()) == {"base"}
