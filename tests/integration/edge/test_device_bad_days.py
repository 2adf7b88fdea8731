"""A device on bad days: kills, cut links, damaged files, a full disk, and a cloud that means no good."""

import random
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.edge.agent.device_run import DeviceRun, InferConfig
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.live import LiveAnswers, Worker
from isthmus.edge.agent.progress import Observer
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime, Stopped
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.capture.sources import replay
from isthmus.edge.link.interface import MemoryLink
from isthmus.edge.own_clips.corrections import Correction
from isthmus.edge.own_clips.habits import Habits
from isthmus.edge.own_clips.person import Said
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.proto.errors import Corrupt, StorageFull, Unavailable
from isthmus.proto.messages import Chunk, InferReply, JobStatus, Stage
from tests.rigs.edge.device import Clock, device, load_test
from tests.rigs.project.patience import HANGS_S


def test_a_kill_at_any_moment_is_only_a_pause(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    """The process dies before each action in turn; every next process goes on, and the work is done once."""
    cloud = students.cloud()

    class Killed(Exception):
        pass

    lives, stages = 0, []
    while True:
        lives += 1
        assert lives < 40
        performed = 0

        def die_at_the_second_action(stage: str) -> None:
            nonlocal performed
            performed += 1
            if performed == 2:
                raise Killed
            stages.append(stage)

        runtime, _, _ = device(tmp_path, cloud, plan, observer=Observer(on_stage=die_at_the_second_action))
        try:
            state = runtime.run()
        except Killed:
            continue
        break
    assert (state.phase, state.active_id, state.base_id) == (Phase.SERVE, "final", "base")
    assert lives > 8
    assert len(cloud.jobs) == 1
    assert stages.count("enrol") == 1
    assert sorted(cloud.uploads) == [("job-1", 0), ("job-1", 1)]


def test_the_link_gone_in_the_middle_of_everything(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    """One call in six fails; the device waits, retries, and ends with the same result."""

    weather = random.Random(3)

    class Flaky(MemoryLink):
        def _check_reachable(self) -> None:
            if weather.random() < 1 / 6:
                raise Unavailable("the cloud cannot be reached")

    cloud = students.cloud()
    cloud.chunk_bytes = 200
    runtime, state, clock = device(tmp_path, cloud, plan, link=Flaky(cloud))
    report: Any = DeviceRun(runtime, state, plan, InferConfig(), cloud="memory").execute()
    assert report["students"]["final"] == "final"
    assert clock.slept
    assert all(None not in each["cloud"].values() for each in report["predictions"])


def test_a_download_that_is_damaged_on_the_way(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    """One flipped byte, once: the file is fetched again. In every download: the old student stays."""

    class Flipping(MemoryLink):
        flips = 1

        def fetch_file(self, student_id: str, file_name: str, offset_bytes: int) -> Iterator[Chunk]:
            for chunk in super().fetch_file(student_id, file_name, offset_bytes):
                if self.flips and student_id == "final":
                    self.flips -= 1
                    data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
                    chunk = Chunk(chunk.offset_bytes, data, zlib.crc32(data))
                yield chunk

    cloud = students.cloud()
    once, _, _ = device(tmp_path / "once", cloud, plan, link=Flipping(cloud))
    assert once.run().active_id == "final"
    always_link = Flipping(students.cloud())
    always_link.flips = 1_000_000
    always, _, _ = device(tmp_path / "always", always_link.cloud, plan, link=always_link)
    state = always.run()
    assert (state.phase, state.active_id) == (Phase.FETCH, "base")
    assert "hash does not match" in state.failure
    current = always.slot.current()
    assert current is not None
    assert current.manifest.student_id == "base"


def test_a_student_signed_by_somebody_else(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    final = cloud.students["final"]
    cloud.students["final"] = replace(final, signature=bytes(64))
    runtime, _, _ = device(tmp_path, cloud, plan)
    state = runtime.run()
    assert state.active_id == "base"
    assert "signature" in state.failure


def test_a_student_of_other_classes_is_refused(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    cloud.enrolment = replace(cloud.enrolment, classes=("SAD", "HAP", "NEU"))
    runtime, _, _ = device(tmp_path, cloud, plan)
    with pytest.raises(Stopped, match="not those this device enrolled with"):
        runtime.run()


def test_a_failed_job(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    cloud.script = (JobStatus("", Stage.FAILED, error="out of memory"),)
    runtime, state, _ = device(tmp_path, cloud, plan)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(), cloud="memory").execute()
    assert "out of memory" in report["failure"]
    assert report["students"]["final"] == ""
    assert report["predictions"][0]["local"] == report["predictions"][0]["before"]


def test_an_answer_of_the_wrong_width_is_refused(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    cloud.answer = lambda student, sequence, frame: InferReply(sequence, np.array([0.5, 0.5], np.float32))
    runtime, state, _ = device(tmp_path, cloud, plan)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(ratios=(1.0,)), cloud="memory").execute()
    assert report["predictions"][0]["cloud"] == {"1": None}
    assert "2 classes of 3" in report["predictions"][0]["cloud_errors"]["1"]
    assert report["predictions"][0]["local"] is not None


def test_a_cloud_that_asks_for_rounds_without_end_gets_those_that_were_agreed(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = students.cloud()
    cloud.script = tuple(
        JobStatus("", Stage.AWAITING_PROTOTYPES, round=round, student_id="interim") for round in range(1, 50)
    )
    runtime, state, _ = device(tmp_path, cloud, plan, config=RunConfig("kiosk", seed=1, rounds=2))
    ended = runtime.run()
    assert (ended.phase, ended.active_id) == (Phase.WATCH, "base")
    assert "2 are allowed" in ended.failure
    runtime.close()
    restarted, _, _ = device(tmp_path, cloud, plan, config=RunConfig("kiosk", seed=1, rounds=50))
    restarted.run()
    assert len(state.ledger()) == len(cloud.uploads) == 2


@pytest.mark.parametrize("name", ["audio_encoder.onnx", "manifest.pb"])
def test_a_flipped_bit_in_the_student_in_use(students: Any, plan: ClipPlan, tmp_path: Path, name: str) -> None:
    cloud = students.cloud()
    first, _, _ = device(tmp_path, cloud, plan)
    first.run()
    first.close()
    path = tmp_path / "students" / "versions" / "final" / name
    content = bytearray(path.read_bytes())
    sound = bytes(content)
    content[len(content) // 2] ^= 0x40
    path.write_bytes(bytes(content))
    cloud.reachable = False
    offline, _, clock = device(tmp_path, cloud, plan)
    assert not offline.check_student()
    assert (offline.state.active_id, offline.state.repair_id) == ("base", "final")
    live = LiveAnswers(offline, Worker(), 0.5, clock.sleep)
    taken = next(replay(plan.test[:1], offline.spec, clock, offline.damage))
    assert live.answer(taken, 0.0).setting is None, "the sound base student answers alone"
    offline.close()
    cloud.reachable = True
    online, _, _ = device(tmp_path, cloud, plan)
    assert online.run().active_id == "final"
    assert path.read_bytes() == sound


def test_a_lost_identity_and_a_lost_student_come_back_by_themselves(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = students.cloud()
    first, state, _ = device(tmp_path, cloud, plan)
    first.run()
    first.close()
    (tmp_path / "credentials.json").unlink()
    second, _, _ = device(tmp_path, cloud, plan)
    ended = second.run()
    assert (ended.phase, ended.active_id) == (Phase.SERVE, "final")
    second.close()
    shutil.rmtree(tmp_path / "students")
    third, _, _ = device(tmp_path, cloud, plan)
    assert third.run().active_id == "final"
    third.close()
    (tmp_path / "outbox.sqlite").write_bytes(b"garbage" * 2000)
    fourth, _, _ = device(tmp_path, cloud, plan)
    fourth.personalise_again()
    assert fourth.run().failure == ""
    assert (tmp_path / "outbox.sqlite.damaged").exists()
    assert len(state.ledger()) == 4


def test_clips_are_answered_while_the_cloud_is_gone_in_mid_job(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = students.cloud()
    first, _, _ = device(tmp_path, cloud, plan)
    first.run(until=Phase.WATCH)
    first.close()
    cloud.reachable = False
    back = threading.Event()

    def sleep(seconds: float) -> None:
        back.wait(HANGS_S)

    runtime, _, clock = device(tmp_path, cloud, plan, sleep=sleep)
    worker = Worker()
    worker.start(lambda: runtime.run(patient=True))
    live = LiveAnswers(runtime, worker, 0.5, clock.sleep)
    taken = next(replay(plan.test[:1], runtime.spec, clock, runtime.damage))
    answered = live.answer(taken, 0.0)
    assert (answered.setting, worker.busy) == (None, True)
    assert answered.answer.predicted is not None
    cloud.reachable = True
    back.set()
    while worker.busy:
        time.sleep(0.01)
    clock.sleep(3600)
    assert runtime.state.active_id == "final"
    assert live.answer(taken, 0.0).setting is not None, "the finished student is asked through the cloud"
    live.close()


def test_a_run_that_ends_by_itself_answers_too_while_it_waits_for_the_cloud(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = students.cloud()
    first, _, _ = device(tmp_path, cloud, plan)
    first.run(until=Phase.WATCH)
    first.close()
    cloud.reachable = False
    events: list[str] = []

    def sleep(seconds: float) -> None:
        events.append("sleep")
        clock.sleep(seconds)
        cloud.reachable = events.count("sleep") == 3

    seen = Observer(on_stage=events.append, on_wait=lambda seconds, reason: events.append(reason))
    runtime, state, clock = device(tmp_path, cloud, plan, sleep=sleep, observer=seen)
    report: Any = DeviceRun(runtime, state, plan, InferConfig(), cloud="memory").execute()
    assert events[:4] == ["watch", "the cloud cannot be reached", "infer_before", "sleep"]
    assert events.count("infer_before") == 1
    assert all(each["before"] is not None for each in report["predictions"])
    assert report["students"]["final"] == "final"


def test_a_link_that_is_cut_again_and_again_makes_steady_progress(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    """Every stream breaks after two chunks: the pauses stay short, and no byte is sent twice."""

    class Cut(MemoryLink):
        def fetch_file(self, student_id: str, file_name: str, offset_bytes: int) -> Iterator[Chunk]:
            for number, chunk in enumerate(super().fetch_file(student_id, file_name, offset_bytes)):
                if number == 2:
                    raise Unavailable("the link is cut")
                yield chunk

    cloud = students.cloud()
    cloud.chunk_bytes = 100
    runtime, _, clock = device(tmp_path, cloud, plan, link=Cut(cloud))
    assert runtime.run().active_id == "final"
    assert len(clock.slept) > 20
    assert max(clock.slept) < 0.5
    tally = runtime.record.downloads["student_base"]
    assert tally.came_bytes == tally.whole_bytes


def test_a_disk_that_is_full_for_a_while(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    class Disk(DeviceState):
        writes = 0

        def _write(self, name: str, content: dict[str, Any]) -> None:
            self.writes += 1
            if 10 <= self.writes < 16:
                raise StorageFull("the disk is full; free some space and it goes on")
            super()._write(name, content)

    cloud = students.cloud()
    clock = Clock()
    runtime = Runtime(
        RunConfig("kiosk", seed=1, guard=False),
        Disk(tmp_path),
        MemoryLink(cloud),
        plan.selection,
        clock=clock,
        sleep=clock.sleep,
        jitter=lambda: 0.5,
        trial=load_test,
    )
    assert runtime.run(patient=True).active_id == "final"
    assert len(clock.slept) >= 5
    assert len(cloud.jobs) == 1


def test_a_student_with_nan_on_real_clips_is_refused_without_the_guard_too(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StudentEncoder.features

    def broken(encoder: StudentEncoder, *inputs: Any) -> Any:
        if encoder._folder.name == "final":
            raise Corrupt("audio_encoder.onnx gives values that are not finite")
        return real(encoder, *inputs)

    monkeypatch.setattr(StudentEncoder, "features", broken)
    runtime, _, _ = device(tmp_path, students.cloud(), plan, trial=lambda folder, manifest: None)
    ended = runtime.run()
    assert (ended.phase, ended.active_id, ended.refused_id) == (Phase.SERVE, "base", "final")
    assert "not finite" in ended.verdict


@pytest.mark.parametrize(
    "name", ["agent.json", "credentials.json", "budget.json", "ledger.json", "habits.json", "corrections.json"]
)
def test_any_flipped_bit_in_a_state_file_ends_in_one_line_or_goes_on(
    students: Any, plan: ClipPlan, tmp_path: Path, name: str
) -> None:
    runtime, state, _ = device(tmp_path, students.cloud(), plan)
    runtime.run()
    runtime.close()
    if name == "habits.json":
        state.save_habits([Habits("final", 8, (0.5, 0.25, 0.25), (0.3, 0.3, 0.4))])
    if name == "corrections.json":
        state.save_said(Said((Correction("clip", "SAD", 1.0, "final"),), 3, (1.0, 2.0)))
    path = tmp_path / name
    content = path.read_bytes()
    chance = random.Random(name)
    for _ in range(50):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            again, _, _ = device(tmp_path, students.cloud(), plan)
            again.clips.habits("final")
            state.said()
            state.ledger()
            again.close()
        except Corrupt as error:
            assert name in str(error)
            assert "move it away" in str(error)
