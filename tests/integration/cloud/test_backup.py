"""Backup and restore, also of a server that runs; and devices that are erased."""

import asyncio
import contextlib
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from isthmus.cloud.backup import backup, restore
from isthmus.cloud.commands.cloud import app
from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import Selected, Taken
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.enrolling import enrol_anew
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.behaviour.state import State
from isthmus.edge.commands.edge import app as edge_app
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.proto import convert
from isthmus.proto.errors import InvalidInput
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.postgres import running_cluster
from tests.rigs.cloud.service import Client


async def one_device(rig: Any, channel: grpc.aio.Channel) -> tuple[Client, str]:
    """An enrolled device with a job that has begun."""
    device = await rig.enrol(channel, "kiosk")
    job = await rig.start(device)
    database = Database(rig.settings().database_url)
    for event in (Taken(), Selected((1, 2, 3))):
        job_rows.apply(database, job.job_id, event, time.time())
    database.close()
    folder = rig.state / "work" / job.job_id
    folder.mkdir(parents=True)
    (folder / "selection-0.npz").write_bytes(b"selected")
    return device, job.job_id


def test_a_backup_of_a_running_server_is_the_same_server_elsewhere(rig: Any, tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    state = ["--state", str(rig.state)]

    async def before() -> tuple[Client, str]:
        async with rig.running() as (_, channel):
            device, job_id = await one_device(rig, channel)
            made = await asyncio.to_thread(CliRunner().invoke, app, ["backup", *state, "--to", str(file)])
            assert made.exit_code == 0, made.output
            return device, job_id

    device, job_id = asyncio.run(before())
    assert file.stat().st_mode & 0o777 == 0o600
    again = CliRunner().invoke(app, ["backup", *state, "--to", str(file)])
    assert (again.exit_code, len(again.stderr.strip().splitlines())) == (1, 1)
    elsewhere = type(rig)(rig.release, tmp_path / "elsewhere")
    made = CliRunner().invoke(app, ["restore", "--state", str(elsewhere.state), "--from", str(file)])
    assert made.exit_code == 0, made.output
    assert (elsewhere.state / "signing_key").read_bytes() == (rig.state / "signing_key").read_bytes()
    assert (elsewhere.state / "work" / job_id / "selection-0.npz").read_bytes() == b"selected"

    async def after() -> None:
        async with elsewhere.running() as (_, channel):
            same = Client(device.device_id, channel, device.metadata)
            student_id = (await same.describe()).student_id
            fetch = pb.FetchStudentRequest(student_id=student_id, file_name="audio_encoder.onnx")
            received = b"".join(
                [chunk.data async for chunk in same.personalisation.FetchStudent(fetch, metadata=same.metadata)]
            )
            assert received == (rig.release / "base" / "audio_encoder.onnx").read_bytes()
            watch = same.personalisation.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=same.metadata)
            assert (await watch.read()).job.stage == pb.JobStatus.Stage.STAGE_DISTILLING

    asyncio.run(after())
    refused = CliRunner().invoke(app, ["restore", "--state", str(elsewhere.state), "--from", str(file)])
    assert refused.exit_code == 1 and "not empty" in refused.stderr


def test_a_backup_moves_between_sqlite_and_postgresql(rig: Any, tmp_path: Path) -> None:
    async def before() -> Client:
        async with rig.running() as (_, channel):
            return (await one_device(rig, channel))[0]

    device = asyncio.run(before())
    database = Database(rig.settings().database_url)
    backup(database, Artefacts(str(rig.state / "artefacts")), rig.state, tmp_path / "backup.tar")
    with running_cluster() as cluster, cluster.database() as empty:
        url = empty.url.render_as_string(hide_password=False)
        elsewhere = type(rig)(rig.release, tmp_path / "elsewhere")
        restore(tmp_path / "backup.tar", url, None, elsewhere.state)
        assert not list(elsewhere.state.glob("*.db*"))

        async def after() -> None:
            async with elsewhere.running(database=url) as (_, channel):
                same = Client(device.device_id, channel, device.metadata)
                assert (await same.describe()).kind == "base"

        asyncio.run(after())
        backup(empty, Artefacts(str(elsewhere.state / "artefacts")), elsewhere.state, tmp_path / "second.tar")
        with pytest.raises(InvalidInput, match="not empty"):
            restore(tmp_path / "backup.tar", url, None, tmp_path / "third")
    restore(tmp_path / "second.tar", f"sqlite:///{tmp_path / 'back' / 'isthmus.db'}", None, tmp_path / "back")
    assert (tmp_path / "back" / "signing_key").read_bytes() == (rig.state / "signing_key").read_bytes()


def test_what_a_kill_left_behind_is_in_nobodys_way(rig: Any, tmp_path: Path) -> None:
    async def run() -> None:
        async with rig.running() as (_, channel):
            await rig.enrol(channel)

    asyncio.run(run())
    (tmp_path / "backup.tar.part").write_bytes(b"half")
    backup(
        Database(rig.settings().database_url),
        Artefacts(str(rig.state / "artefacts")),
        rig.state,
        tmp_path / "backup.tar",
    )
    (tmp_path / "new.restoring").mkdir()
    (tmp_path / "new.restoring" / "signing_key").write_bytes(b"half")
    restore(tmp_path / "backup.tar", f"sqlite:///{tmp_path / 'new' / 'isthmus.db'}", None, tmp_path / "new")
    assert (tmp_path / "new" / "signing_key").read_bytes() == (rig.state / "signing_key").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "new", "state"]


def test_damaged_and_hostile_backups_change_nothing(rig: Any, tmp_path: Path) -> None:
    async def run() -> None:
        async with rig.running() as (_, channel):
            await rig.enrol(channel)

    asyncio.run(run())
    file = tmp_path / "backup.tar"
    backup(Database(rig.settings().database_url), Artefacts(str(rig.state / "artefacts")), rig.state, file)
    content = file.read_bytes()
    url = f"sqlite:///{tmp_path / 'new' / 'isthmus.db'}"
    wrong = [b"", content[: len(content) // 2], b"garbage" * 1_000]
    # A bit in every member's content; in headers and padding a bit may be of no consequence.
    with tarfile.open(file) as tar:
        for member in tar:
            flipped = bytearray(content)
            flipped[member.offset_data + member.size // 2] ^= 1
            wrong.append(bytes(flipped))
    for each in wrong:
        file.write_bytes(each)
        with pytest.raises(InvalidInput, match="backup"):
            restore(file, url, None, tmp_path / "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "state"]
    for name in ("../evil", "/etc/evil", "state/../../evil", "other"):
        with tarfile.open(file, "w") as tar:
            tar.addfile(tarfile.TarInfo(name))
        with pytest.raises(InvalidInput, match="backup"):
            restore(file, url, None, tmp_path / "new")
    with tarfile.open(file, "w") as tar:
        link = tarfile.TarInfo("state/signing_key")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InvalidInput, match="not a file"):
        restore(file, url, None, tmp_path / "new")


def test_an_erased_device_leaves_nothing_behind(rig: Any, caplog: pytest.LogCaptureFixture) -> None:
    state = ["--state", str(rig.state)]

    async def scenario() -> tuple[Client, Client, str]:
        async with rig.running() as (_, channel):
            other = await rig.enrol(channel, "another")
            device, job_id = await one_device(rig, channel)
            database = Database(rig.settings().database_url)
            payload = job_rows.payload(database, job_id, 0)
            database.close()
            assert payload[20:80] in (rig.state / "isthmus.db-wal").read_bytes()
            erased = await asyncio.to_thread(CliRunner().invoke, app, ["devices", *state, "--delete", device.device_id])
            assert erased.exit_code == 0, erased.output
            assert (await rig.refusal(device.describe()))[0] is grpc.StatusCode.UNAUTHENTICATED
            assert (await other.describe()).kind == "base"
            kept = b"".join(path.read_bytes() for path in rig.state.rglob("*") if path.is_file())
            assert payload[20:80] not in kept
            return device, other, job_id

    device, other, job_id = asyncio.run(scenario())
    secret = device.metadata[0][1].rpartition(".")[2]
    kept = b"".join(path.read_bytes() for path in sorted(rig.state.rglob("*")) if path.is_file())
    names = b" ".join(os.fsencode(path) for path in rig.state.rglob("*"))
    for trace in (b"kiosk", job_id.encode(), secret.encode(), device.device_id.encode()):
        assert trace not in kept
        assert trace not in names
    assert "kiosk" not in caplog.text
    assert other.device_id.encode() in kept
    again = CliRunner().invoke(app, ["devices", *state, "--delete", device.device_id])
    assert again.exit_code == 1


def test_a_device_that_forgets_itself_leaves_nothing_on_either_side(
    rig: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The id, the token and every value that was sent are in no file, no name of a file and no line of the log."""
    caplog.set_level("DEBUG", "isthmus")
    mine = tmp_path / "device"
    prototypes = convert.prototypes_from_pb(rig.prototypes())

    def live_and_forget(address: str) -> tuple[str, str, str]:
        device = DeviceState(mine)
        with contextlib.closing(GrpcLink(open_channel(address))) as link:
            enrol_anew(RunConfig("the kiosk of Ada"), device, link)
            enrolment = device.enrolment()
            assert enrolment is not None
            link.authenticate(enrolment.token)
            job_id = link.start_personalisation("key-of-ada", prototypes, rounds=1, seed=1).job_id
        device.save_agent(State(active_id="s"))
        (mine / "students").mkdir()
        (mine / "students" / "current").symlink_to("nowhere")
        kept = b"".join(path.read_bytes() for path in rig.state.rglob("*") if path.is_file())
        assert prototypes.values_KC[0].tobytes() in kept, "the search below finds such values"
        forgotten = CliRunner().invoke(edge_app, ["forget", "--state", str(mine), "--cloud", address])
        assert forgotten.exit_code == 0, forgotten.output
        return enrolment.device_id, enrolment.token, job_id

    async def scenario() -> tuple[str, str, str]:
        async with rig.running() as (server, _):
            return await asyncio.to_thread(live_and_forget, f"127.0.0.1:{server.port}")

    device_id, token, job_id = asyncio.run(scenario())
    assert list(mine.iterdir()) == []
    kept = b"".join(path.read_bytes() for path in rig.state.rglob("*") if path.is_file())
    kept += " ".join(map(str, rig.state.rglob("*"))).encode()
    for trace in (device_id, token, token.rpartition(".")[2], job_id, "Ada", "key-of-ada"):
        assert trace.encode() not in kept
        assert trace not in caplog.text
    for row_C in prototypes.values_KC:
        for value in row_C:
            assert row_C.tobytes() not in kept
            assert f"{value:.6g}" not in caplog.text


def test_many_devices_can_be_revoked_at_once(rig: Any) -> None:
    async def scenario() -> None:
        async with rig.running() as (_, channel):
            for _ in range(3):
                await rig.enrol(channel)

    asyncio.run(scenario())
    state = ["--state", str(rig.state)]
    none = CliRunner().invoke(app, ["devices", *state, "--revoke-since", "2100-01-01T00:00:00"])
    assert "0 devices are shut out" in none.stdout
    every = CliRunner().invoke(app, ["devices", *state, "--revoke-since", "2000-01-01T00:00:00"])
    assert "3 devices are shut out" in every.stdout
