"""A device without a data set: it captures, answers, stores, and personalises from what it has stored."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cli import main
from isthmus.data.media.decode import decode_sound
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent import live
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.life import Life
from isthmus.edge.agent.live import Worker
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.agent.service_manager import ServiceManager
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.capture.process import NOBODY, Captured
from isthmus.edge.capture.sources import replay
from isthmus.edge.commands import living, running
from isthmus.edge.commands.options import RunOptions
from isthmus.edge.link.interface import MemoryLink
from isthmus.edge.link.sent import SentMessages
from isthmus.edge.own_clips.store import ClipStore, StoredSelection
from isthmus.proto.errors import StorageFull
from tests.rigs.edge.device import load_test
from tests.rigs.project.patience import HANGS_S

PERSON_COMES = 3
"""The first clips are of an empty room."""


class Studio:
    """A capture whose person plays the clips of a plan, one after the other, and ends the run after ``most``."""

    def __init__(self, plan: ClipPlan, most: int) -> None:
        self.refs = [*plan.selection, *plan.test]
        self.most, self.number, self.opened = most, 0, 0
        self.workers: list[Worker] = []
        self.wait: Callable[[float], None]

    def __call__(self, spec: InputSpec, *positional: object, **options: Any) -> "Studio":
        self.spec = spec
        self.opened += 1
        self.wait = options["wait"]
        return self

    def __enter__(self) -> "Studio":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def next_clip(self, name: str) -> Captured:
        self.number += 1
        self.wait(0.0)
        if self.number > self.most:
            while any(each.busy for each in self.workers):
                time.sleep(0.01)
            raise KeyboardInterrupt
        if self.number <= PERSON_COMES:
            return Captured(None, NOBODY)
        time.sleep(0.01)  # the worker personalises meanwhile
        spec = self.spec
        ref = self.refs[self.number % len(self.refs)]
        taken = next(replay([ref], spec, time.monotonic, lambda damage: None))
        assert taken.clip.frames_KHWC is not None
        pictures = [np.ascontiguousarray(each) for each in taken.clip.frames_KHWC]
        return Captured(taken, "", decode_sound(ref, spec), pictures)


@contextlib.contextmanager
def living_device(folder: Path, cloud: Any) -> Iterator[tuple[Runtime, DeviceState, ClipStore]]:
    device = DeviceState(folder)
    store = living.store_of(device)
    runtime = Runtime(
        RunConfig("kiosk", seed=1, guard=False), device, MemoryLink(cloud), StoredSelection(store), trial=load_test
    )
    with contextlib.closing(runtime):
        yield runtime, device, store


@contextlib.contextmanager
def waited_for(studio: Studio) -> Iterator[pytest.MonkeyPatch]:
    """Let the studio know the workers that are made in the block: it ends no run before they are done."""

    class Known(Worker):
        def __init__(self) -> None:
            super().__init__()
            studio.workers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "Worker", Known)
        yield patch


def lived(
    runtime: Runtime, device: DeviceState, store: ClipStore, studio: Studio, service: ServiceManager | None = None
) -> None:
    """Run the device until its worker is done and the studio ends it."""
    with waited_for(studio), pytest.raises(KeyboardInterrupt):
        life = Life(SentMessages(device.root / "sent.sqlite"))
        life.service = service or life.service
        living.keep_living(runtime, device, store, RunOptions(clips_before=8), HANGS_S, life)


def run_command(state: Path, cloud: Any, plan: ClipPlan, most: int, *words: str) -> MemoryLink:
    """Run ``isthmus edge run`` for so many clips of a person, over a cloud in memory; return its link."""
    link = MemoryLink(cloud)
    studio = Studio(plan, PERSON_COMES + most)
    with waited_for(studio) as patch:
        patch.setattr(running, "_link", lambda *_: link)
        patch.setattr(running, "Runtime", functools.partial(Runtime, trial=load_test))
        patch.setattr(living, "Capture", studio)
        with pytest.raises(SystemExit):
            usual = ["--cloud", "127.0.0.1:1", "--state", str(state), "--clips-before", "8"]
            # The cloud in memory answers at once, but a busy machine may let the device wait for it.
            main(["edge", "run", *usual, "--latency-budget-ms", str(1000 * HANGS_S), *words])
    return link


def test_the_command_asks_the_cloud_about_clips_unless_it_is_told_not_to(
    students: Any, plan: ClipPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = students.cloud()
    run_command(tmp_path, cloud, plan, 14, "--no-guard", "--no-ask-cloud")
    assert DeviceState(tmp_path).agent().active_id == "final"
    for words, where in (((), "(through the cloud, ratio"), (("--no-ask-cloud",), "(on the device)")):
        capsys.readouterr()
        link = run_command(tmp_path, cloud, plan, 4, *words)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all(where in line for line in lines), lines
        assert bool(link.traffic.up_bytes["inference"]) == (not words)


def test_people_who_share_a_device_have_nothing_of_each_other_and_nothing_is_kept_of_a_person_unknown(
    students: Any, plan: ClipPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = students.cloud()
    run_command(tmp_path, cloud, plan, 14, "--no-guard", "--person", "anna")
    anna, ben = DeviceState(tmp_path / "people" / "anna"), DeviceState(tmp_path / "people" / "ben")
    before = contents(anna.root)
    run_command(tmp_path, cloud, plan, 3, "--person", "ben")
    assert contents(anna.root) == before
    assert (anna.agent().active_id, ben.agent().active_id) == ("final", "base")
    assert not {clip.name for clip in living.store_of(ben).clips()} & {
        clip.name for clip in living.store_of(anna).clips()
    }
    before = contents(tmp_path / "people")
    capsys.readouterr()
    run_command(tmp_path, cloud, plan, 14, "--no-guard", "--again")
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 14, "a person unknown is answered"
    assert said.err.count("shared by anna, ben: nothing of a person unknown is kept; --person NAME") == 1
    assert "nobody is named, so the student in use stays" in said.err
    assert contents(tmp_path / "people") == before
    nobody = DeviceState(tmp_path)
    assert (nobody.agent().active_id, nobody.ledger(), living.store_of(nobody).clips()) == ("base", [], [])
    assert nobody.window("base") is None and not nobody.habits()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_task_has_ended_when_the_runtime_is_closed(tmp_path: Path, students: Any) -> None:
    with living_device(tmp_path / "device", students.cloud()) as (runtime, _, _):
        hung_up, ended = threading.Event(), threading.Event()

        def task() -> None:
            assert hung_up.wait(HANGS_S), "a call that ends when the link is closed"
            time.sleep(0.05)
            ended.set()

        with pytest.MonkeyPatch.context() as patch, live.working(runtime) as worker:
            patch.setattr(runtime.link, "close", hung_up.set)
            worker.start(task)
        assert ended.is_set()


def test_a_device_lives_from_an_empty_folder_to_a_personal_student(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with living_device(tmp_path / "device", students.cloud()) as (runtime, device, store):
        studio = Studio(plan, most=22)
        monkeypatch.setattr(living, "Capture", studio)
        lived(runtime, device, store, studio)
        assert runtime.state.phase is Phase.SERVE
        out = capsys.readouterr()
        assert out.err.count(NOBODY) == 1, "said once, however long nobody is there"
        assert len(out.out.splitlines()) == 22 - PERSON_COMES, "every clip with a person is answered"
        assert "(on the device)" in out.out
        assert runtime.state.active_id == "final"
        assert len(store.clips()) == 22 - PERSON_COMES
        (entry, *_) = device.ledger()
        assert sum(entry.sizes) >= 8, "prototypes of the stored clips"
        budget, enrolment = device.budget(), device.enrolment()
        assert budget is not None and enrolment is not None
        assert budget.rounds == enrolment.rounds or not enrolment.rounds, "pinned by the enrolment, not before it"
        lived(runtime, device, store, studio)
        assert runtime.state.active_id == "final"
        assert len(device.ledger()) == len({each.idempotency_key for each in device.ledger()})


def test_the_cloud_answers_while_the_next_personalisation_waits_for_clips(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = students.cloud()
    with living_device(tmp_path / "device", cloud) as (runtime, device, store):
        studio = Studio(plan, most=16)
        monkeypatch.setattr(living, "Capture", studio)
        lived(runtime, device, store, studio)
        assert runtime.state.active_id == "final"
        runtime.personalise_again()
        store.delete_all()
    capsys.readouterr()
    with living_device(tmp_path / "device", cloud) as (runtime, device, store):
        studio = Studio(plan, most=PERSON_COMES + 4)
        monkeypatch.setattr(living, "Capture", studio)
        lived(runtime, device, store, studio)
        assert runtime.state.phase is Phase.ENCODE, "four clips are too few"
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all("(through the cloud, ratio" in line for line in lines), lines


def test_a_full_disk_stores_nothing_and_every_clip_is_answered(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with living_device(tmp_path / "device", students.cloud()) as (runtime, device, store):
        studio = Studio(plan, most=8)
        monkeypatch.setattr(living, "Capture", studio)

        def full(*words: object) -> str:
            raise StorageFull("the disk is full; free some space and it goes on")

        monkeypatch.setattr(store, "add", full)
        lived(runtime, device, store, studio)
        out = capsys.readouterr()
        assert len(out.out.splitlines()) == 8 - PERSON_COMES
        assert out.err.count("this clip is answered, not stored: the disk is full") == 1
        assert store.clips() == []


class Watching(ServiceManager):
    """A manager that notes what it hears, and how many clips had been captured by then."""

    def __init__(self, studio: Studio) -> None:
        super().__init__({}, lambda: 0.0)
        self._studio = studio
        self.heard: list[tuple[str, int]] = []

    def ready(self) -> None:
        self.heard.append(("ready", self._studio.number))

    def alive(self) -> None:
        self.heard.append(("alive", self._studio.number))

    def status(self, text: str) -> None:
        self.heard.append((text, self._studio.number))


def test_the_service_manager_hears_of_each_clip(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the loop that captures feeds the watchdog: if a driver, a disk or a library hangs, it is not fed."""
    with living_device(tmp_path / "device", students.cloud()) as (runtime, device, store):
        studio = Studio(plan, most=5)
        monkeypatch.setattr(living, "Capture", studio)
        manager = Watching(studio)
        lived(runtime, device, store, studio, manager)
    alive = [number for what, number in manager.heard if what == "alive"]
    assert alive[-6:] == [1, 2, 3, 4, 5, 6]
    assert manager.heard[0] == ("ready", 0)
    said = [what for what, _ in manager.heard if what not in ("ready", "alive")]
    assert said == ["waiting for the cloud's base student", "capturing; press Ctrl-C to end", NOBODY]


def test_a_pause_closes_camera_and_microphone(
    students: Any, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with living_device(tmp_path / "device", students.cloud()) as (runtime, device, store):
        studio = Studio(plan, most=99)
        monkeypatch.setattr(living, "Capture", studio)
        monkeypatch.setattr(living, "PAUSED_LOOK_S", 0.0)
        store.pause()
        looks = iter(range(5))

        def work(*positional: object) -> None:
            if runtime.state.active_id and next(looks, None) is None:
                raise KeyboardInterrupt
            original(*positional)  # type: ignore[arg-type]

        original = living._work
        monkeypatch.setattr(living, "_work", work)
        lived(runtime, device, store, studio)
        assert studio.opened == 0 and store.clips() == []
        assert capsys.readouterr().err.count("paused: nothing is captured") == 1


def test_the_commands_show_keep_delete_and_pause(
    tmp_path: Path, plan: ClipPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "device"
    store = living.store_of(DeviceState(state / "people" / "anna"))
    names = [store.add(np.full(16_000, 0.1, np.float32), None, InputSpec()) for _ in range(3)]

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["edge", "clips", *words, "--state", str(state)])
        out = capsys.readouterr()
        return out.out if not ended.value.code else out.err

    assert "3 clips in" in run("list", "--person", "anna")
    assert "0 clips in" in run("list"), "another person's clips are not shown"
    run("keep", names[0], "--person", "anna")
    assert run("delete", names[1], "--person", "anna").strip().endswith("learned of them without the cloud")
    assert [(clip.name, clip.kept) for clip in store.clips()] == [(names[0], True), (names[2], False)]
    assert "there is no clip" in run("delete", names[1], "--person", "anna")
    assert "or give --all" in run("delete")
    run("pause", "--person", "anna")
    assert store.paused
    run("resume", "--person", "anna")
    assert not store.paused
    anna = DeviceState(state / "people" / "anna")
    anna.save_agent(replace(anna.agent(), base_id="base", active_id="final"))
    assert "the student that was made of them stays" in run("delete", "--all", "--person", "anna")
    assert store.clips() == []
    assert "is no folder of a device" in run("list", "--person", "berta")
    assert "--person" in run("list", "--person", "../anna")


@pytest.mark.parametrize("words", ["--once", "--report r.json", "--ratios 1", "--actor 1003", "--clips names.txt"])
def test_choices_of_a_data_set_need_one(tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["edge", "run", "--cloud", "127.0.0.1:1", "--state", str(tmp_path), *words.split()])
    assert f"{words.split()[0]} needs --data" in capsys.readouterr().err
