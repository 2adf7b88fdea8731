"""This version opens every file that an earlier version wrote, and finishes its unfinished work.

``formats/<version>/`` holds the files of each version, and a README that says how they were made. Tests use a copy.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.files import load_tasks
from isthmus.cloud.elastic.tasks.task import ModelShape
from isthmus.cloud.elastic.warm.store import WarmStore
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.data.splits import Split
from isthmus.demo.devices import client_outcome
from isthmus.distill.release import Release
from isthmus.distill.teacher.teach import train_teacher
from isthmus.distill.training.checkpoint import state_hash
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.project import commands

FORMATS = Path(__file__).parent / "formats"
RELEASES = sorted((Path(__file__).parent / "releases").glob("*.whl"))
VERSIONS = sorted(path.parent.name for path in FORMATS.glob("*/expected.json"))
CLIPS = ("--data", "clips", "--actor", "1002", "--seed", "3")
MODEL = ("--model", "elastic/model.safetensors", "--pixels", "half", "--threads", "1", "--device", "cpu")
TASK = ("--data", "elastic/pictures.parquet", "--task", "elastic/bright-dark.task.json")
LINKED_BYTES = 1 << 20
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Old:
    """A copy of one version's files, which a test may change. ``formats/make.py`` names the folders."""

    folder: Path
    expected: dict[str, Any]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def jobs(self) -> list[list[str]]:
        """Return id, device, stage and round of every job, oldest first. A server must have upgraded the database."""
        return [line.split("\t")[:4] for line in isthmus("cloud", "jobs", "--state", "cloud").splitlines()]


@pytest.fixture(scope="module", params=VERSIONS)
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("formats")
    shutil.copytree(FORMATS / request.param, folder, dirs_exist_ok=True)
    with tarfile.open(folder / "loop.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def old(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Old:
    """Make the copy and change into it. Files over 1 MB are linked: no program writes to a student's file in place."""

    def copied(source: str, target: str) -> None:
        (os.link if os.path.getsize(source) > LINKED_BYTES else shutil.copy2)(source, target)

    shutil.copytree(unpacked, tmp_path, symlinks=True, copy_function=copied, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Old(tmp_path, json.loads((tmp_path / "expected.json").read_text()))


def isthmus(*words: object, code: int = 0) -> str:
    """Run an ``isthmus`` command, which must end with ``code``, and return what it prints, errors included."""
    ended, printed = commands.ended(words)
    assert ended == code, printed
    return printed


@contextlib.contextmanager
def serving(**changes: object) -> Iterator[str]:
    """Serve the copy's release, cloud folder and model from a thread, and yield the server's address."""
    settings = CloudSettings(
        **{
            "release": Path("release"),
            "state": Path("cloud"),
            "elastic_model": "elastic/model.safetensors",
            "elastic_pixels": "half",
            "elastic_profile": Path("elastic/profile.json"),
            "worker_threads": 1,
            **changes,
        }
    )
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    started: list[object] = []
    up = threading.Event()

    async def serve() -> None:
        server = Server(settings)
        try:
            started.append(await server.start())
        except BaseException as error:
            started.append(error)
            raise
        finally:
            up.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert up.wait(600)
        assert isinstance(started[0], int), started[0]
        yield f"127.0.0.1:{started[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def run_device(address: str, state: str, *more: object) -> Any:
    """Run the device of the folder ``state`` to its end and return its report."""
    report = ("--once", "--report", "report.json")
    isthmus("edge", "run", "--cloud", address, "--state", state, "--name", "any", *CLIPS, *report, *more)
    return json.loads(Path("report.json").read_text())


def answers_of(report: Any) -> list[Any]:
    return [(clip["name"], clip["local"], clip["plain"], clip["cloud"]) for clip in report["predictions"]]


def test_a_device_is_known_to_the_cloud_and_sends_what_waited_in_its_outbox(old: Old) -> None:
    """Resume a device that was killed before its upload was acknowledged; the cloud had finished the job of its key."""
    jobs = [row[:4] for row in old.expected["jobs"]]
    with contextlib.closing(sqlite3.connect("device-uploading/outbox.sqlite")) as outbox:
        assert outbox.execute("SELECT name FROM outbox").fetchall() == [("prototypes/0",)]
    before = old.json("first")
    with serving(workers=0, elastic_model=None) as address:
        report = run_device(address, "device-uploading", "--rounds", 1)
    assert report["students"] == before["students"]
    assert report["job"]["id"] == jobs[0][0] and report["job"]["stage"] == "ready"
    assert report["guard"]["accepted"] == before["guard"]["accepted"]
    assert answers_of(report) == answers_of(before)
    assert np.allclose(report["habits"]["shares"], before["habits"]["shares"], atol=TOLERANCE)
    with contextlib.closing(sqlite3.connect("device-uploading/outbox.sqlite")) as outbox:
        assert outbox.execute("SELECT name FROM outbox").fetchall() == []
    assert old.jobs() == jobs


@pytest.mark.parametrize("wheel", RELEASES, ids=lambda path: path.stem)
def test_a_backup_of_a_killed_server_of_an_earlier_release_is_restored_by_this_version(old: Old, wheel: Path) -> None:
    """The released version serves the folder, is killed and writes the backup; this one restores and serves it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall("released")
    environment = {**os.environ, "PYTHONPATH": str(old.folder / "released")}
    command = [sys.executable, "-P", "-m", "isthmus.cli", "cloud"]
    serve = [*command, "serve", "--release", "release", "--state", "cloud", "--workers", "0"]
    with subprocess.Popen(serve, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ")
        process.kill()
    subprocess.run([*command, "backup", "--state", "cloud", "--to", "backup.tar"], env=environment, check=True)
    isthmus("cloud", "restore", "--state", "restored", "--from", "backup.tar")
    assert Path("restored/signing_key").read_bytes() == Path("cloud/signing_key").read_bytes()
    work = "2a3aec505e40337b/checkpoint.safetensors"
    assert digest_of(Path("restored/work", work)) == digest_of(Path("cloud/work", work))
    with serving(workers=0, state=Path("restored"), elastic_model=None) as address:
        report = run_device(address, "device-serving")
        jobs = isthmus("cloud", "jobs", "--state", "restored").splitlines()
    assert answers_of(report) == answers_of(old.json("first-again"))
    assert [line.split("\t")[:4] for line in jobs] == [row[:4] for row in old.expected["jobs"]]


def test_a_cloud_has_its_students_and_tasks_and_a_device_serves_with_its_own(old: Old) -> None:
    before, final = old.json("first-again"), old.expected["status"]["student"]
    status = json.loads(isthmus("edge", "status", "--state", "device-serving", "--json"))
    assert {name: status.get(name) for name in old.expected["status"]} == old.expected["status"]
    shown = json.loads(isthmus("edge", "prototypes", "--state", "device-serving", *CLIPS, "--json"))
    known = old.json("first.prototypes")
    assert np.allclose(shown["values"], known["values"], atol=TOLERANCE) and shown["sizes"] == known["sizes"]
    with serving(workers=0) as address:
        names = [line.split("\t")[1] for line in isthmus("cloud", "devices", "--state", "cloud").splitlines()]
        assert names == ["first", "second"]
        assert isthmus("elastic", "tasks", "--server", address).split("\t")[:2] == ["bright-dark", "1"]
        assert_answers(address, old.expected["elastic"])
        report = run_device(address, "device-serving")
    students = {
        str(path.relative_to("cloud/artefacts")): digest_of(path)
        for path in sorted(Path("cloud/artefacts").rglob("*"))
        if path.is_file()
    }
    assert {name: students.pop(name, "") for name in old.expected["students"]} == old.expected["students"]
    assert all(name.endswith(f".{digest}") for name, digest in students.items()), "files by their content, beside them"
    assert before["students"]["final"] == final
    assert answers_of(report) == answers_of(before)
    assert before["students"]["base"] in isthmus("edge", "rollback", "--state", "device-serving")
    assert final in isthmus("edge", "rollback", "--state", "device-serving")


def test_a_device_and_its_cloud_finish_the_round_that_both_were_stopped_in(old: Old) -> None:
    """The worker resumes from its checkpoint with the prototypes that the device makes with the interim student."""
    mine = old.expected["jobs"][-1][:4]
    assert mine[2:] == ["awaiting_prototypes", "2/2"]
    with serving(elastic_model=None) as address:
        report = run_device(address, "device-watching")
    assert (report["failure"], report["job"]["id"], report["job"]["stage"]) == ("", mine[0], "ready")
    assert report["students"]["interim"] == [f"{mine[0]}-r0"]
    assert [each["round"] for each in report["prototypes"]["rounds"]] == [0, 1]
    assert old.jobs()[-1][:3] == [*mine[:2], "ready"]
    assert not any(Path("cloud/work").iterdir())


def assert_answers(address: str, expected: dict[str, Any], *, classes_alone: bool = False) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.ElasticServiceStub(channel)
        for name, known in expected.items():
            encoded = Path(f"elastic/{name}.png").read_bytes()
            reply = stub.MakeQuery(pb.MakeQueryRequest(task="bright-dark", encoded=encoded, latency_s=60))
            assert reply.class_name == known["class"]
            assert reply.gamma == known["gamma"]
            assert classes_alone or np.allclose(reply.logits, known["logits"], atol=TOLERANCE)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_a_release_and_its_decoded_clips(old: Old) -> None:
    """Every network has the same accuracy as before, and the selection file trains heads.

    A teacher that is trained again resumes from its finished checkpoints: its encoders stay, bit for bit. Its head is
    fitted again on their features, whose last bits differ from machine to machine.
    """
    release = Release.open(Path("release"))
    assert f"base-{release.release_hash}" in {row.split("/")[0] for row in old.expected["students"]}
    assert len(release.public) == 18 and release.public.frames_NKHWC.shape == (18, 2, 36, 36, 3)
    split = Split.from_json(Path("split.json").read_text())
    assert split == Split.from_json(Path("release/split.json").read_text())
    assert set(split.clients) == {"1002"} and len(split.public) == 18

    isthmus("distill", "evaluate", "--release", "release", "--data", "clips", "--out", "figures.json")
    figures, known = old.json("figures")["1002"], old.json("evaluation")["1002"]
    assert figures == pytest.approx(known, abs=1 / 18 + 1e-9)  # one clip may be between two classes

    student = ("--student", "release/students/0.safetensors")
    isthmus("distill", "compress", "--release", "release", *student, "--selection", "selection.json", "--out", "heads")
    assert Path("heads").stat().st_size > 1_000

    before = release.teacher
    train_teacher(release, seed=0, device=torch.device("cpu"))
    again = Release.open(Path("release")).teacher
    assert state_hash([again.encoders]) == state_hash([before.encoders])
    for tensor, known in zip(again.head.state_dict().values(), before.head.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, known, rtol=TOLERANCE, atol=TOLERANCE)


def test_tasks_schedules_and_profile(old: Old) -> None:
    (task,) = load_tasks(Path("elastic/tasks"), ModelShape(2, 64, 16))
    assert task.spec.classes == ("dark", "bright") and set(task.weights.prompts_LGD) == {1, 2}
    profile = Profile.from_json(Path("elastic/profile.json").read_text())
    assert profile.merge_order == "receiving-first", "the only one there was"
    assert profile.gammas == (-4, 0, 2) and set(profile.accuracy) == {"bright-dark"}
    searched = old.json("elastic/schedules")
    assert profile.schedules == {-4: tuple(searched["schedules"]["-4"])}

    options = ("--gammas=-4", "--evaluations", 4, "--tasks", "elastic/tasks", "--out", "elastic/schedules.json")
    isthmus("elastic", "schedules", *MODEL, *TASK[:2], *options)
    assert old.json("elastic/schedules")["tried"] == searched["tried"]
    options = ("--gammas", "1,2", "--measured=-4,0", "--epochs", 2, "--out", "elastic/tasks")
    said = isthmus("elastic", "prompts", *MODEL, *TASK, *options)
    assert "epoch" not in said, said
    (again,) = load_tasks(Path("elastic/tasks"), ModelShape(2, 64, 16))
    assert again.spec == task.spec and np.array_equal(again.weights.head_weight_CD, task.weights.head_weight_CD)

    cell = old.json("elastic/experiment/cells/profile-synthetic-1-0")
    cell["queries"] = -1  # a newly made cell would not have it
    Path("elastic/experiment/cells/profile-synthetic-1-0.json").write_text(json.dumps(cell))
    grid = ("--trace", "synthetic", "--loads", 1, "--seeds", 0, "--duration-s", 1, "--policies", "priced,clipper")
    isthmus("experiment", "elastic", "--profile", "elastic/profile.json", *grid, "--out", "elastic/experiment")
    assert old.json("elastic/experiment/result")["cells"][0]["queries"] == -1


@pytest.mark.parametrize("wheel", RELEASES, ids=lambda path: path.stem)
def test_a_search_that_an_earlier_release_began_goes_on_in_its_order_of_merging(old: Old, wheel: Path) -> None:
    """Another order would need another search, so this one would be refused."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall("released")
    environment = {**os.environ, "PYTHONPATH": str(old.folder / "released")}
    search = ("elastic", "schedules", *MODEL, *TASK[:2], "--gammas=-4", "--tasks", "elastic/tasks")
    search += ("--out", "begun.json")
    begin = [sys.executable, "-P", "-m", "isthmus.cli", *search, "--evaluations", "2"]
    subprocess.run(begin, env=environment, check=True)
    begun = old.json("begun")
    isthmus(*search, "--evaluations", 3)
    after = old.json("begun")
    assert after["key"] == begun["key"] and after["tried"]["-4"][:2] == begun["tried"]["-4"]
    assert len(after["tried"]["-4"]) == 3
    said = isthmus(*search, "--merge-order", "published", code=1)
    assert "begun.json was made with the order receiving-first" in " ".join(said.split())


def test_warmed_models(old: Old) -> None:
    """The models load and serve their task, and running the same command again tunes nothing."""
    store = WarmStore(Path("warmup/models"))
    assert store.merge_order() == "receiving-first"
    assert store.common().classes == ("dark", "bright")
    cards, bad = store.usable()
    assert bad == {} and set(cards) == {"vanilla", "tuned-4", "tuned-8"}
    for name in cards:
        assert set(store.load(name)) == set(cards[name].tensors)
    with serving(workers=0, elastic_warm=store.path, release=None) as address:
        assert_answers(address, old.expected["elastic"], classes_alone=True)
    learning = ("--numbers", "0,4,8", "--middle", 4, "--epochs", 1, "--batch-size", 8, "--learning-rate", 0.001)
    said = isthmus("elastic", "warmup", "run", *MODEL, *TASK, *learning, "--vanilla-epochs", 2, "--out", "warmup")
    assert "epoch" not in said and "tuning for" not in said, said


def test_a_synthetic_set_goes_on(old: Old) -> None:
    Path("synthetic").mkdir()
    shutil.move("synthetic.json", "synthetic")
    made = ("data", "make", "crema-d", "synthetic", "--actors", 1, "--takes", 1)
    assert "other arguments" in isthmus(*made, "--seed", 6, code=1)
    isthmus(*made, "--seed", 5)
    assert len(list(Path("synthetic/AudioWAV").iterdir())) == 6


def test_a_report_is_read_by_the_demo(old: Old) -> None:
    outcome = client_outcome("first", old.json("first"), None, (), old.json("first.prototypes"), (16.0, 64.0))
    assert outcome.test_clips == 9 and outcome.rounds == 1


def one_line(said: str, *wanted: str) -> None:
    assert len(said.strip().splitlines()) == 1 and "Traceback" not in said, said
    assert all(part in said for part in wanted), said


def test_folders_of_a_newer_version_are_refused_and_left_alone(old: Old) -> None:
    with contextlib.closing(sqlite3.connect("cloud/isthmus.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    before = digest_of(Path("cloud/isthmus.db"))
    newer = ("made by a newer version", "Run that version")
    one_line(isthmus("cloud", "serve", "--release", "release", "--state", "cloud", code=1), *newer)
    one_line(isthmus("cloud", "jobs", "--state", "cloud", code=1), *newer)
    assert digest_of(Path("cloud/isthmus.db")) == before

    agent = old.json("device-serving/agent")
    Path("device-serving/agent.json").write_text(json.dumps({**agent, "format": 3}))
    newer = ("written by a newer version", "format is 3", "Install the newer version")
    one_line(isthmus("edge", "status", "--state", "device-serving", code=1), *newer)
    run: Sequence[object] = ("edge", "run", "--cloud", "127.0.0.1:1", "--state", "device-serving", *CLIPS)
    one_line(isthmus(*run, code=1), *newer)
    assert old.json("device-serving/agent") == {**agent, "format": 3}
