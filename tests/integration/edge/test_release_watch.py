"""A device over a cloud in memory that offers it another release: followed once, judged, refused, and taken back."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.live import Worker
from isthmus.edge.agent.release_watch import ReleaseWatch, follow
from isthmus.edge.agent.runtime import RunConfig, Runtime
from isthmus.edge.behaviour.moving import Move
from isthmus.edge.behaviour.state import Phase, State
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.link.interface import MemoryCloud
from isthmus.proto.convert_student import manifest_from_bytes, manifest_to_bytes
from isthmus.proto.errors import StorageFull
from isthmus.proto.messages import JobStatus, SignedManifest, Stage
from tests.rigs.edge.device import Clock, device
from tests.rigs.project.patience import HANGS_S


class Cloud:
    """A cloud in memory whose students are of releases "a" and "b", signed with versions."""

    def __init__(self, students: Any) -> None:
        self._students = students
        self.memory: MemoryCloud = students.cloud()
        self.memory.script = (
            JobStatus("", Stage.SELECTING, 0, 1),
            JobStatus("", Stage.READY, 0, 1, student_id="final"),
        )
        self._version = 0
        for seed, name in enumerate(("base-a", "base-b", "final-a", "final-b")):
            files = students.files(name.split("-")[0], 10 + seed)
            self.memory.files |= {(name, file): data for file, data in files.items()}
            self.memory.students[name] = students.signed(name, name.split("-")[0], files)
            self.sign(name)
        self.offer("a")

    def sign(self, name: str, *, version: int | None = None, expires_s: float = 0.0) -> None:
        """Sign a student's manifest again, by default with a higher version."""
        kind, release = name.split("-")
        self._version += 1
        manifest = replace(
            manifest_from_bytes(self.memory.students[name].manifest_bytes),
            release=release,
            version=self._version if version is None else version,
            device_id="" if kind == "base" else "device-1",
            expires_s=expires_s,
        )
        content = manifest_to_bytes(manifest)
        self.memory.students[name] = SignedManifest(content, self._students.key.sign(content))

    def offer(self, release: str) -> None:
        """Offer a release: jobs make students of it, and its base student has the highest version."""
        self.sign(f"base-{release}")
        self.sign(f"final-{release}")
        self.memory.offered_id = self.memory.newest_id = f"base-{release}"
        *before, ready = self.memory.script
        self.memory.script = (*before, replace(ready, student_id=f"final-{release}"))


@contextmanager
def served(folder: Path, cloud: Cloud, plan: ClipPlan, **changes: Any) -> Iterator[tuple[Runtime, DeviceState, Clock]]:
    """A device that has personalised on release a."""
    runtime, state, clock = device(folder, cloud.memory, plan, **changes)
    with closing(runtime):
        runtime.run()
        assert runtime.state.active_id == "final-a"
        yield runtime, state, clock


def test_another_release_is_followed_once_and_left_without_an_upload(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = Cloud(students)
    with served(tmp_path, cloud, plan) as (runtime, state, _):
        assert follow(runtime) is Move.STAY
        assert runtime.state.moved_to == "a"
        cloud.offer("b")
        assert follow(runtime) is Move.AGAIN
        assert (runtime.state.phase, runtime.state.active_id) == (Phase.SERVE, "final-b")
        assert follow(runtime) is Move.STAY
        uploads = len(state.ledger())
        assert uploads == 2
        cloud.offer("a")
        assert follow(runtime) is Move.BACK
        assert runtime.state.active_id == "final-a"
        cloud.offer("b")
        assert follow(runtime) is Move.BACK, "the student of b is still here"
        assert (runtime.state.active_id, len(state.ledger())) == ("final-b", uploads)
        assert state.agent().moved_to == "b", "a restart does not forget it"


def test_a_student_that_is_refused_leaves_the_one_in_use_and_is_not_tried_again(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = Cloud(students)
    with served(tmp_path, cloud, plan):
        pass
    cloud.offer("b")
    with served(tmp_path, cloud, plan, guard=True) as (runtime, state, _):
        monkeypatch.setattr(runtime.clips, "compare", lambda old, new, in_use: (False, "not good enough"))
        assert follow(runtime) is Move.AGAIN
        assert (runtime.state.active_id, runtime.state.refused_id) == ("final-a", "final-b")
        assert follow(runtime) is Move.STAY and len(state.ledger()) == 2


def test_a_device_that_could_not_begin_to_follow_an_offer_tries_again(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offer and the begun personalisation are written together: killed anywhere, the device follows."""
    cloud = Cloud(students)
    with served(tmp_path, cloud, plan) as (runtime, state, _):
        cloud.offer("b")
        save, written = DeviceState.save_agent, [state.agent()]

        def full(self: DeviceState, agent: State) -> None:
            raise StorageFull("the device's disk is full")

        def noted(self: DeviceState, agent: State) -> None:
            written.append(agent)
            save(self, agent)

        monkeypatch.setattr(DeviceState, "save_agent", full)
        assert follow(runtime) is Move.STAY
        assert (runtime.state.phase, runtime.state.moved_to) == (Phase.SERVE, "")
        monkeypatch.setattr(DeviceState, "save_agent", noted)
        assert follow(runtime) is Move.AGAIN
        assert runtime.state.active_id == "final-b"
        assert not [
            each for each in written if (each.moved_to, each.phase, each.active_id) == ("b", Phase.SERVE, "final-a")
        ]


@pytest.mark.parametrize("damaged", ["manifest.pb", "audio_encoder.onnx"])
def test_a_damaged_student_before_is_made_again(students: Any, plan: ClipPlan, tmp_path: Path, damaged: str) -> None:
    cloud = Cloud(students)
    with served(tmp_path, cloud, plan) as (runtime, state, _):
        cloud.offer("b")
        assert follow(runtime) is Move.AGAIN
        file = runtime.slot.installed("final-a").folder / damaged
        file.chmod(0o600)
        file.write_bytes(b"damaged")
        cloud.offer("a")
        assert follow(runtime) is Move.AGAIN
        assert (runtime.state.active_id, len(state.ledger())) == ("final-a", 3)
        assert runtime.slot.is_sound("final-a")


def test_nothing_is_sent_without_clips_or_beyond_the_persons_budget(
    students: Any, plan: ClipPlan, tmp_path: Path
) -> None:
    cloud = Cloud(students)
    config = RunConfig("kiosk", seed=1, epsilon_budget=1.0)
    config = replace(config, choices=replace(config.choices, noise=1.0))
    with served(tmp_path, cloud, plan, config=config) as (runtime, state, _):
        cloud.offer("b")
        assert not runtime.affordable
        assert follow(runtime) is Move.STAY
    with served(tmp_path, cloud, plan, config=replace(config, epsilon_budget=2.0)) as (runtime, state, _):
        assert follow(runtime, may_personalise=False) is Move.STAY
        assert (runtime.state.active_id, len(state.ledger()), runtime.state.moved_to) == ("final-a", 1, "")
        assert follow(runtime) is Move.AGAIN, "it is tried again when it can be"
        assert runtime.state.active_id == "final-b"


def test_what_is_not_signed_or_is_old_moves_no_device(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    cloud = Cloud(students)
    with served(tmp_path, cloud, plan) as (runtime, state, _):
        cloud.offer("b")
        signed = cloud.memory.students["base-b"]
        cloud.memory.students["base-b"] = replace(signed, signature=bytes(64))
        assert follow(runtime) is Move.STAY, "somebody else's signature"
        cloud.memory.students["base-b"] = signed
        cloud.sign("base-b", version=1)
        assert follow(runtime) is Move.STAY, "an old offer that is shown again"
        cloud.sign("base-b", expires_s=1.0)
        assert follow(runtime) is Move.STAY, "it has expired"
        cloud.memory.reachable = False
        assert follow(runtime) is Move.STAY
        cloud.memory.reachable = True
        assert len(state.ledger()) == 1
        cloud.offer("b")
        assert follow(runtime) is Move.AGAIN


def test_a_cloud_that_knows_no_releases_moves_no_device(students: Any, plan: ClipPlan, tmp_path: Path) -> None:
    """A cloud of version 0.1 answers with the newest student; its students name no release."""
    memory = students.cloud()
    runtime, state, _ = device(tmp_path, memory, plan)
    with closing(runtime):
        runtime.run()
        uploads = len(state.ledger())
        assert follow(runtime) is Move.STAY
        cloud = Cloud(students)
        memory.students |= {"base-b": cloud.memory.students["base-b"]}
        memory.offered_id = "base-b"
        assert follow(runtime) is Move.STAY, "the release of its own student is unknown"
        named = replace(
            manifest_from_bytes(memory.students["final"].manifest_bytes), release="a", version=1, device_id="device-1"
        )
        content = manifest_to_bytes(named)
        memory.students["final"] = SignedManifest(content, students.key.sign(content))
        memory.script = cloud.memory.script
        memory.students["final-b"] = cloud.memory.students["final-b"]
        memory.files |= cloud.memory.files
        memory.script = (memory.script[0], replace(memory.script[1], student_id="final-b"))
        assert follow(runtime) is Move.AGAIN, "the cloud has signed it anew, with its release"
        assert len(state.ledger()) == uploads + 1


def test_looks_come_every_few_hours_and_only_while_nothing_else_is_done(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = Cloud(students)
    looks: list[bool] = []
    monkeypatch.setattr(
        "isthmus.edge.agent.release_watch.follow", lambda runtime, may_personalise: looks.append(may_personalise)
    )
    with served(tmp_path, cloud, plan) as (runtime, _, clock):
        may = [True]
        watch = ReleaseWatch(runtime, lambda: 0.5, may_personalise=lambda: may[0], every_s=1_000.0, first_s=100.0)
        worker = Worker()
        assert not watch.look(worker), "devices that start together do not look together"
        clock.now_s += 51.0
        assert watch.look(worker)
        worker.wait(HANGS_S)
        clock.now_s += 700.0
        assert not watch.look(worker)
        clock.now_s += 100.0
        may[0] = False
        runtime.state = replace(runtime.state, phase=Phase.WATCH)
        assert not watch.look(worker)
        runtime.state = replace(runtime.state, phase=Phase.SERVE)
        assert watch.look(worker)
        worker.wait(HANGS_S)
    assert looks == [True, False]
