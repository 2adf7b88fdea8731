"""``isthmus cloud release`` beside a running server, and what it refuses."""

import asyncio
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from isthmus.cloud.backup import backup, restore
from isthmus.cloud.commands.cloud import app
from isthmus.cloud.metrics.releases import ReleaseCollector
from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.elsewhere.on_ray import RayLearning
from isthmus.cloud.personalise.runners import Opened
from isthmus.cloud.personalise.worker import Worker
from isthmus.cloud.releases.copies import Copies
from isthmus.cloud.store import releases
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database, Unusable
from isthmus.distill.release import Release, ReleaseError
from isthmus.proto.errors import Corrupt, InvalidInput
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.jobs import CountedLearning
from tests.rigs.cloud.service import make_tiny_release
from tests.rigs.distill.release import wide_recipe


@pytest.fixture(scope="module")
def better(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another training of the tiny release: another base student."""
    root = tmp_path_factory.mktemp("better") / "release"
    shutil.copytree(tiny_release, root)
    path = Release.open(root).student_path(0)
    save_file({name: value + torch.ones_like(value) for name, value in load_file(path).items()}, path)
    (root / "base" / "audio_encoder.onnx").write_bytes(b"of the better release")
    return root


def command(*words: str) -> str:
    done = CliRunner().invoke(app, ["release", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, ["release", *words])
    assert done.exit_code != 0 and not isinstance(done.exception, AssertionError)
    return " ".join(done.stderr.split())


def published(state: Path, release: Path) -> str:
    return command("publish", "--release", str(release), "--state", str(state)).split()[1]


async def offered(device: Any) -> pb.StudentManifest:
    request = pb.DescribeStudentRequest(offered=True)
    reply = await device.personalisation.DescribeStudent(request, metadata=device.metadata)
    return pb.StudentManifest.FromString(reply.manifest)


def test_what_is_offered_changes_beside_a_running_server_and_outlives_it(rig: Any, better: Path) -> None:
    state = ("--state", str(rig.state))

    async def scenario() -> None:
        async with rig.running() as (_, channel):
            device, other = await rig.enrol(channel), await rig.enrol(channel)
            first = (await offered(device)).release
            second = await asyncio.to_thread(published, rig.state, better)
            assert (await offered(device)).release == first
            await asyncio.to_thread(command, "offer", second, "--device", device.device_id, *state)
            manifests = [await offered(each) for each in (device, other, device)]
            assert [each.release for each in manifests] == [second, first, second]
            assert manifests[0].student_id == f"base-{second}" == (await device.describe()).student_id
            assert manifests[0] == manifests[2], "it is signed anew once, not at each look"
            job = await rig.start(device)
            assert job.stage == pb.JobStatus.Stage.STAGE_QUEUED
            metadata = (*device.metadata, ("isthmus-student", f"base-{first}"))
            with pytest.raises(grpc.aio.AioRpcError):
                await device.personalisation.DescribeStudent(
                    pb.DescribeStudentRequest(offered=True, student_id="x"), metadata=device.metadata
                )
            async for _ in device.inference.Infer(iter(()), metadata=metadata):
                pass
            families = {each.name: each for each in ReleaseCollector(Database(rig.settings().database_url)).collect()}
            using = {each.labels["release"]: each.value for each in families["isthmus_release_devices"].samples}
            assert using == {first: 1, second: 0, "unknown": 1}, "the student that it asked with last"
            share = {each.labels["release"]: each.value for each in families["isthmus_release_offered_share"].samples}
            assert share == {first: 1.0, second: 0.0}
            await asyncio.to_thread(command, "offer", second, "--everyone", *state)
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            assert (await offered(device)).release == second, "a start with the first release changes nothing"
        async with type(rig)(better, rig.state).running() as (_, channel):
            assert (await offered(await rig.enrol(channel))).release == second
        await asyncio.to_thread(command, "withdraw", second, *state)
        async with type(rig)(better, rig.state).running() as (_, channel):
            assert (await offered(await rig.enrol(channel))).release == first, "nor does one with the second"
        async with type(rig)(better, rig.state).running(accept_release=True) as (_, channel):
            assert (await offered(await rig.enrol(channel))).release == second, "unless it is said"

    asyncio.run(scenario())


def test_a_release_of_another_class_list_is_refused_by_name(rig: Any, better: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(better, other)
    release = Release.open(other)
    classes = ("SAD", "HAP", "NEU")
    (other / "recipe.json").write_text(dataclasses.replace(release.recipe, classes=classes).to_json())

    async def scenario() -> None:
        async with rig.running():
            pass
        hint = refused("publish", "--release", str(other), "--state", str(rig.state))
        assert "has other classes (SAD, HAP, NEU)" in hint and "a cloud of its own" in hint
        with pytest.raises(Unusable, match=r"\d more files were changed"):
            async with type(rig)(other, rig.state).running():
                pass
        with pytest.raises(InvalidInput, match="has other classes"):
            async with type(rig)(other, rig.state).running(accept_release=True):
                pass

    asyncio.run(scenario())


def test_a_release_of_another_feature_width_is_refused_and_nothing_stops(
    rig: Any, better: Path, tmp_path: Path
) -> None:
    """Devices keep the width of their enrolment, so such a release needs a cloud of its own."""
    make_tiny_release(tmp_path / "wide", wide_recipe())
    wide, state = str(tmp_path / "wide"), ("--state", str(rig.state))

    async def scenario() -> None:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            before = await offered(device)
            listed = await asyncio.to_thread(command, "list", *state)
            hint = await asyncio.to_thread(refused, "publish", "--release", wide, *state)
            widths = "(512) than the devices that enrolled here (128)"
            assert f"has another width of features {widths}" in hint and "Serve it by a cloud of its own" in hint
            assert await asyncio.to_thread(command, "list", *state) == listed, "nothing of it is to be seen"
            assert await offered(device) == before
            second = await asyncio.to_thread(published, rig.state, better)
            await asyncio.to_thread(command, "offer", second, "--everyone", *state)
            assert (await offered(device)).release == second, "and another release is published as before"
        with pytest.raises(InvalidInput, match="has another width of features"):
            async with type(rig)(tmp_path / "wide", rig.state).running(accept_release=True):
                pass
        async with rig.running() as (_, channel):
            assert (await offered(await rig.enrol(channel))).release == second

    asyncio.run(scenario())


def test_bad_input_is_refused_with_the_way_out(rig: Any, better: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig.running():
            pass

    asyncio.run(scenario())
    state = ("--state", str(rig.state))
    assert "no release nothing is published; these are:" in refused("offer", "nothing", "--everyone", *state)
    first = command("list", *state).splitlines()[-1].split("\t")[0]
    assert "give --everyone, or --percent or --device" in refused("offer", first, *state)
    assert "give --everyone, or --percent or --device" in refused(
        "offer", first, "--everyone", "--percent", "5", *state
    )
    assert "no enrolled device nobody" in refused("offer", first, "--device", "nobody", *state)
    assert "first offer another release to everyone" in refused("offer", first, "--percent", "5", *state)
    assert "first offer another release to everyone" in refused("withdraw", first, *state)
    assert "withdraw it first" in refused("remove", first, *state)
    assert "is not a release" in refused("publish", "--release", str(tmp_path), *state)
    assert "give --state" in refused("publish", "--release", str(better))
    key = tmp_path / "key"
    shutil.copy(rig.state / "signing_key", key)
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    assert "key" in refused("publish", "--release", str(better), *state, "--signing-key-file", str(key))
    assert len(command("list", *state).splitlines()) == 1, "nothing of all this is left behind"


def test_a_publication_that_is_killed_at_any_step_shows_nothing_and_is_continued(
    rig: Any, better: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            first = (await offered(device)).release
            for step in ("files.store", "students.publish_base", "releases.put"):
                with monkeypatch.context() as killing:

                    def killed(*positional: object, **named: object) -> None:
                        raise KeyboardInterrupt

                    killing.setattr(f"isthmus.cloud.commands.releases.changing.{step}", killed)
                    done = await asyncio.to_thread(
                        CliRunner().invoke, app, ["release", "publish", "--release", str(better), *state]
                    )
                    assert done.exit_code != 0
                assert len(command("list", *state).splitlines()) == 1
                assert (await offered(device)).release == first
            second = await asyncio.to_thread(published, rig.state, better)
            assert second == await asyncio.to_thread(published, rig.state, better), "twice is as good as once"

    state = ("--state", str(rig.state))
    asyncio.run(scenario())


def test_a_published_release_does_not_change(rig: Any, better: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig.running():
            pass

    asyncio.run(scenario())
    published(rig.state, better)
    changed = tmp_path / "changed"
    shutil.copytree(better, changed)
    (changed / "base" / "audio_encoder.onnx").write_bytes(b"changed")
    hint = refused("publish", "--release", str(changed), "--state", str(rig.state))
    assert "is published already, with another base/audio_encoder.onnx" in hint


def test_a_backup_holds_published_releases(rig: Any, better: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig.running():
            pass

    asyncio.run(scenario())
    second = published(rig.state, better)
    database = Database(rig.settings().database_url)
    backup(database, Artefacts(rig.settings().artefacts_url), rig.state, tmp_path / "backup.tar")
    database.close()
    restored = tmp_path / "restored"
    restore(tmp_path / "backup.tar", f"sqlite:///{restored / 'isthmus.db'}", None, restored)
    again = Database(f"sqlite:///{restored / 'isthmus.db'}")
    row = releases.get(again, second)
    assert row is not None and row.stored
    copies = Copies(tmp_path / "copies", Artefacts(str(restored / "artefacts")), 1 << 40)
    opened = Release.open(copies.folder(row))
    assert opened.release_hash == second
    assert len(releases.records(again)) == 1
    again.close()


def test_jobs_on_a_release_whose_files_are_damaged_wait_and_others_go_first(
    rig: Any, better: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker was started with the first release and fetches the other; here from artefacts that were damaged."""
    state = ("--state", str(rig.state))

    async def scenario() -> str:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            second = await asyncio.to_thread(published, rig.state, better)
            await asyncio.to_thread(command, "offer", second, "--device", device.device_id, *state)
            await rig.start(device)
            other = await rig.enrol(channel)
            await rig.start(other)
            return second

    second = asyncio.run(scenario())
    folder = rig.state / "artefacts" / f"release-{second}"
    damaged = next(path for path in folder.iterdir() if path.name.startswith("teacher.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    worker = Worker(rig.settings(worker_threads=1))
    assert worker.run_once()
    waiting = next(job for job in job_rows.listing(worker.database) if job.release_hash == second)
    assert "teacher.safetensors of release" in waiting.error and "publish the release again" in waiting.error
    assert waiting.not_before_s > waiting.created_s and not waiting.stage.ended
    published(rig.state, better)

    def newer(root: Path) -> Release:
        raise ReleaseError(f"{root}/recipe.json: made by a later version")

    with monkeypatch.context() as patched:
        patched.setattr(Release, "open", staticmethod(newer))
        with pytest.raises(Corrupt, match=f"cannot open release {second}: .* of the version that made it") as refused:
            worker.runners.of(second)
        assert str(rig.state) not in str(refused.value), "devices are told the reason"
    assert worker.runners.of(second).offer.release_hash == second
    worker.stop()
    worker.database.close()


def test_a_cluster_elsewhere_learns_on_the_workers_own_release_alone(rig: Any) -> None:
    offer, learning = Offer("release", ("a",), "{}", 8, (1.0,), 2, 2, 3), CountedLearning()
    for executor, own, fetched in (("thread", False, False), ("ray", True, True), ("ray://127.0.0.1:9", True, False)):
        settings = rig.settings(executor=executor)
        worker = Worker(settings)
        for folder, remote in ((settings.release, own), (settings.state / "releases" / "release", fetched)):
            placed = worker._placed(Opened(folder, offer, learning))
            assert isinstance(placed, RayLearning) if remote else placed is learning
        worker.database.close()


def test_the_list_in_a_pipe_has_a_line_per_release(rig: Any) -> None:
    async def scenario() -> None:
        async with rig.running():
            pass

    asyncio.run(scenario())
    lines = [line.split("\t") for line in command("list", "--state", str(rig.state)).splitlines()]
    assert [line[1:4] for line in lines] == [["everyone", "0", "--release of a server"]]
