"""A device whose students have a person model: it learns its user's voice and face, and from what they say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.edge.agent.device_run import DeviceRun, InferConfig
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.live import LiveAnswers, Worker
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Stopped
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.capture.sources import replay
from isthmus.edge.commands.edge import app
from isthmus.edge.link.interface import MemoryCloud, MemoryInferSession, MemoryLink
from isthmus.edge.own_clips.personal import Personal
from isthmus.edge.requests.device import Device
from isthmus.edge.requests.requests import answered, ask
from isthmus.proto.errors import Corrupt, InvalidInput, WrongState
from isthmus.proto.messages import InferReply, JobStatus, Prototypes, PublicMeasure, SignedManifest
from tests.rigs.distill.people import person_model
from tests.rigs.edge.device import device


def with_person_models(students: Any) -> MemoryCloud:
    """A cloud whose base and final students have person models of their own."""
    cloud: MemoryCloud = students.cloud()
    for seed, kind in enumerate(("base", "interim", "final")):
        if kind != "interim":
            measured = PublicMeasure(100, 0.8, 0.5, (0.98, 0.01, 0.01))
            centred = person_model(3, 12, seed)
            cloud.students[kind] = students.signed(kind, kind, students.files(kind, seed), measured, centred)
    return cloud


class Overheard(MemoryLink):
    """A link that notes every byte of content that goes up, in order."""

    def __init__(self, cloud: MemoryCloud) -> None:
        super().__init__(cloud)
        self.sent: list[bytes] = []

    def start_personalisation(
        self, idempotency_key: str, prototypes: Prototypes, *, rounds: int, seed: int
    ) -> JobStatus:
        self.sent += [b"start", prototypes.values_KC.tobytes(), prototypes.sizes_K.tobytes()]
        return super().start_personalisation(idempotency_key, prototypes, rounds=rounds, seed=seed)

    def upload_prototypes(self, job_id: str, round: int, prototypes: Prototypes) -> JobStatus:
        self.sent += [b"round", prototypes.values_KC.tobytes(), prototypes.sizes_K.tobytes()]
        return super().upload_prototypes(job_id, round, prototypes)

    def open_infer(self, student_id: str, *, timeout_s: float) -> MemoryInferSession:
        session, sent = super().open_infer(student_id, timeout_s=timeout_s), self.sent

        class Noted(MemoryInferSession):
            def ask(self, sequence: int, frame: bytes, *, timeout_s: float) -> InferReply:
                sent.append(frame)
                return session.ask(sequence, frame, timeout_s=timeout_s)

        return Noted(self, student_id)


def command(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("guard", [True, False])
def test_the_offset_replaces_habits_and_is_in_the_report(
    students: Any, plan: ClipPlan, tmp_path: Path, guard: bool
) -> None:
    runtime, state, _ = device(tmp_path, with_person_models(students), plan, guard=guard)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0,)), cloud="memory").execute()
    active = runtime.state.active_id
    reading = runtime.clips.reading(active)
    assert isinstance(reading, Personal)
    assert report["habits"] is None and report["person"]["student_id"] == active
    assert (report["person"]["clips"], report["person"]["corrections"]) == (8, 0)
    assert report["person"]["sentences"][0] == "Your voice and face were learned from 8 of your clips, without labels."
    assert report["accuracy"]["with_corrections"] is None
    for clip in report["predictions"]:
        assert clip["local"] == clip["without_labels"] is not None and clip["with_corrections"] is None
        assert None not in (clip["before"], clip["before_without_labels"], clip["cloud"]["1"])
    assert {path.stem for path in (tmp_path / "windows").iterdir()} >= {"base", active}
    again = device(tmp_path, with_person_models(students), plan, guard=guard)[0].clips.reading(active)
    assert isinstance(again, Personal), "a restart knows it"
    assert again.offset.offset_MC.tobytes() == reading.offset.offset_MC.tobytes()
    shown = json.loads(command("status", "--state", str(tmp_path), "--json"))
    assert shown["person"] == " ".join(report["person"]["sentences"]) and shown["corrections"] == 0


def test_without_habits_nothing_is_learned_of_the_user(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    config = RunConfig("kiosk", seed=1, habits=False)
    runtime, state, _ = device(tmp_path, with_person_models(students), plan, config=config)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0,)), cloud="memory").execute()
    assert report["person"] is None and report["habits"] is None and not (tmp_path / "windows").exists()
    assert [one["local"] for one in report["predictions"]] == [one["plain"] for one in report["predictions"]]


def test_nothing_that_is_learned_of_the_user_is_sent(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    """Two devices with the same clips: one learns its user and is corrected, the other may learn nothing."""
    overheard = []
    for learns in (True, False):
        folder, link = tmp_path / str(learns), Overheard(with_person_models(students))
        config = RunConfig("kiosk", seed=1, habits=learns)
        runtime, state, _ = device(folder, link.cloud, plan, link=link, config=config)
        run = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0, 1.5)), cloud="memory")
        first: Any = run.execute()
        assert (first["person"] is not None) == learns
        if learns:
            for ref, label in zip(plan.selection[:4], ("SAD", "NEU", "SAD", "HAP"), strict=True):
                runtime.clips.person.correct(runtime.state.active_id, ref.name, label, 1.0)
        runtime.personalise_again()
        second: Any = run.execute()
        assert (second["accuracy"]["with_corrections"] is not None) == learns
        runtime.close()
        overheard.append(link.sent)
    learned, unlearned = overheard
    assert learned.count(b"start") == 2 and len(learned) > 2 * len(plan.test)
    assert learned == unlearned


def test_a_student_without_a_person_model_goes_on_with_habits(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = with_person_models(students)
    measured = PublicMeasure(100, 0.8, 0.5, (0.98, 0.01, 0.01))
    cloud.students["final"] = students.signed("final", "final", students.files("final", 2), measured)
    runtime, state, _ = device(tmp_path, cloud, plan)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0,)), cloud="memory").execute()
    assert report["person"] is None and report["habits"]["student_id"] == "final"
    with pytest.raises(WrongState, match="no person model"):
        ask(DeviceState(tmp_path), "correct", clip=plan.selection[0].name, label="SAD")


def test_a_damaged_person_model_is_refused(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    """One flipped bit in the signed manifest; and a signed model whose numbers are no person model."""
    cloud = with_person_models(students)
    runtime, _, _ = device(tmp_path / "damaged", cloud, plan)
    runtime.run()
    manifest = tmp_path / "damaged" / "students" / "versions" / "final" / "manifest.pb"
    content = bytearray(manifest.read_bytes())
    content[len(content) // 2] ^= 1
    manifest.write_bytes(content)
    with pytest.raises(Corrupt, match="signature"):
        runtime.slot.installed("final")
    assert runtime.clips.person.unsaid("final") is None

    broken = person_model(3, 12)
    broken = replace(broken, person=replace(broken.person, within_MCC=-broken.person.within_MCC))
    signed: SignedManifest = students.signed("base", "base", students.files("base", 0), None, broken)
    cloud.students["base"] = signed
    other, _, _ = device(tmp_path / "signed", cloud, plan)
    with pytest.raises(Stopped, match="within is no covariance"):
        other.run()


def test_corrections_by_commands_with_and_without_a_running_device(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    runtime, state, _ = device(tmp_path, with_person_models(students), plan)
    run = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0,)), cloud="memory")
    run.execute()
    active = runtime.state.active_id
    before = runtime.clips.reading(active)
    assert isinstance(before, Personal)
    folder = str(tmp_path)
    asked = json.loads(command("ask", "--state", folder, "--a-day", "9", "--json"))
    assert asked["clip"] in {ref.name for ref in plan.selection} and len(asked["guesses"]) == 3
    label = min(asked["guesses"], key=asked["guesses"].get)
    assert "1 corrections count" in command("correct", asked["clip"], label, "--state", folder)
    assert "What was" in command("ask", "--state", folder)
    assert "taken back" in command("correct", "--undo", "--state", folder)

    with answered(Device(state, runtime)):
        ask(DeviceState(tmp_path), "correct", clip=asked["clip"], label=label)
        corrected = runtime.clips.reading(active)
        assert isinstance(corrected, Personal) and corrected.corrections == 1, "the running device knows at once"
        with pytest.raises(InvalidInput, match="is no class of this student"):
            ask(DeviceState(tmp_path), "correct", clip=asked["clip"], label="angry")
        with pytest.raises(InvalidInput, match="not among the 8 clips"):
            ask(DeviceState(tmp_path), "correct", clip=plan.test[0].name, label=label)
        report: Any = run.execute()
        assert report["person"]["corrections"] == 1 and report["accuracy"]["with_corrections"] is not None
        assert all(clip["with_corrections"] == clip["local"] is not None for clip in report["predictions"])
        ask(DeviceState(tmp_path), "undo_correction")
    undone = runtime.clips.reading(active)
    assert isinstance(undone, Personal) and undone.change_CE is None
    assert undone.offset.offset_MC.tobytes() == before.offset.offset_MC.tobytes()
    assert undone.offset.prior_C.tobytes() == before.offset.prior_C.tobytes()
    for words in (["correct", "x"], ["correct", "--undo", "x", "y"], ["correct"]):
        assert CliRunner().invoke(app, [*words, "--state", folder]).exit_code == 2


def test_answered_clips_join_the_window(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    runtime, _, clock = device(tmp_path, with_person_models(students), plan)
    runtime.run()
    active = runtime.state.active_id
    live = LiveAnswers(runtime, Worker(), 0.5, clock.sleep)
    answers = [live.answer(taken, 0.5) for taken in replay(plan.test, runtime.spec, runtime.clock, runtime.damage)]
    assert all(
        np.isfinite(one.answer.probabilities_C).all() for one in answers if one.answer.probabilities_C is not None
    )
    clip = plan.test[0].name
    ask_reading = runtime.clips.person.correct(active, clip, "SAD", 1.0)
    assert ask_reading.corrections == 1 and ask_reading.offset.clips == len(plan.selection) + len(plan.test)
    live.close()


def test_the_labels_decide_about_the_next_student(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    runtime, state, _ = device(tmp_path, with_person_models(students), plan, guard=False)
    runtime.run()
    person, active = runtime.clips.person, runtime.state.active_id
    for ref in plan.selection[:4]:
        person.correct(active, ref.name, "SAD", 1.0)
    runtime.close()
    again, _, _ = device(tmp_path, with_person_models(students), plan, guard=True)
    again.personalise_again()
    again.run()
    verdict = state.verdict()
    assert verdict is not None and verdict.estimator == "corrections"
    assert "of 4 clips that you corrected" in again.state.verdict
    assert verdict.accept == (verdict.new["corrections"] >= verdict.old["corrections"])
