"""Damaged, foreign or newer files in the state folder: one line that names the file and a way out, no traceback."""

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from isthmus.cloud.commands.cloud import app
from isthmus.cloud.personalise import job_rows, leases
from isthmus.cloud.personalise.supervisor import Supervisor
from isthmus.cloud.personalise.worker import Worker
from isthmus.cloud.store.database import Unusable
from isthmus.proto.errors import InvalidInput, Locked
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.certificate import write_certificate


def refusal(rig: Any, **changes: object) -> str:
    """The one line with which a server on the state folder refuses to start."""

    async def scenario() -> None:
        async with rig.running(**changes):
            pass

    with pytest.raises(InvalidInput) as refused:
        asyncio.run(scenario())
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


def used(rig: Any) -> Path:
    """The state folder of a server that has run and enrolled a device."""

    async def scenario() -> None:
        async with rig.running() as (_, channel):
            await rig.enrol(channel)

    asyncio.run(scenario())
    return Path(rig.state)


def garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 2_000)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [garbage, half])
def test_a_damaged_database_is_named_by_every_command(rig: Any, damage: Callable[[Path], None]) -> None:
    state = used(rig)
    damage(state / "isthmus.db")
    assert "isthmus.db is damaged" in refusal(rig)
    listed = CliRunner().invoke(app, ["devices", "--state", str(state)])
    assert listed.exit_code == 1
    assert "isthmus.db" in listed.stderr
    assert "Traceback" not in listed.stderr


def test_a_damaged_schema_is_named_too(rig: Any) -> None:
    state = used(rig)
    content = (state / "isthmus.db").read_bytes()
    assert content.count(b"token_hash") > 0
    (state / "isthmus.db").write_bytes(content.replace(b"token_hash", b"tokem_hash"))
    listed = CliRunner().invoke(app, ["devices", "--state", str(state)])
    assert listed.exit_code == 1
    assert "isthmus.db is damaged" in listed.stderr


def test_a_database_of_a_newer_version_is_left_alone(rig: Any) -> None:
    state = used(rig)
    connection = sqlite3.connect(state / "isthmus.db")
    connection.execute("UPDATE alembic_version SET version_num = '0099'")
    connection.commit()
    connection.close()
    assert "newer version of Isthmus" in refusal(rig)


def test_a_folder_where_the_database_should_be_is_named(rig: Any) -> None:
    (rig.state / "isthmus.db").mkdir(parents=True)
    assert "isthmus.db cannot be opened" in refusal(rig)


def test_a_key_of_another_certificate_is_named(rig: Any, tmp_path: Path) -> None:
    write_certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    write_certificate(tmp_path / "other.pem", tmp_path / "other-key.pem")
    message = refusal(rig, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "other-key.pem")
    assert "does not belong to the certificate" in message
    (tmp_path / "key.pem").write_text("no key")
    assert "not a PEM" in refusal(rig, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")


def flipped(path: Path) -> None:
    """One bit of the file changed."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_emptied_database_is_not_started_over(rig: Any) -> None:
    state = used(rig)
    for path in state.glob("isthmus.db*"):
        if not path.name.endswith(".lock"):
            path.unlink()
    message = refusal(rig)
    assert "is empty" in message and "isthmus cloud restore" in message
    (state / "isthmus.db").unlink(missing_ok=True)
    assert "is empty" in refusal(rig), "nor at the second try"


def test_another_database_is_noticed(rig: Any, tmp_path: Path) -> None:
    state = used(rig)
    other = used(type(rig)(rig.release, tmp_path / "other"))
    for path in state.glob("isthmus.db-*"):
        path.unlink()
    (state / "isthmus.db").write_bytes((other / "isthmus.db").read_bytes())
    assert "not the one" in refusal(rig)


@pytest.mark.parametrize(("damage", "says"), [(Path.unlink, "is gone"), (flipped, "exchanged"), (half, "damaged")])
def test_a_changed_or_vanished_signing_key_is_not_replaced(rig: Any, damage: Callable[[Path], None], says: str) -> None:
    key = used(rig) / "signing_key"
    damage(key)
    before = key.read_bytes() if key.exists() else None
    assert says in refusal(rig)
    assert (key.read_bytes() if key.exists() else None) == before


@pytest.mark.parametrize("name", ["database.id", "signing_key"])
@pytest.mark.parametrize("how", ["empty", "half", "flipped", "folder"])
def test_no_file_of_the_state_folder_leads_to_a_traceback(rig: Any, name: str, how: str) -> None:
    path = used(rig) / name
    if how == "folder":
        path.unlink()
        path.mkdir()
    else:
        {"empty": lambda path: path.write_bytes(b""), "half": half, "flipped": flipped}[how](path)
    assert name in refusal(rig) or "not the one" in refusal(rig)


def stored(folder: Path, name: str) -> Path:
    """The file of a student in its folder of artefacts, whose name ends with its hash."""
    (path,) = folder.glob(f"{name}.*")
    return path


def test_a_damaged_base_student_is_mended_from_the_release(rig: Any) -> None:
    state = used(rig)
    (folder,) = (state / "artefacts").iterdir()
    for name in ("audio_encoder.onnx", "heads.safetensors"):
        flipped(stored(folder, name))
    stored(folder, "visual_encoder.onnx").unlink()
    used(rig)
    for path in sorted((rig.release / "base").iterdir()):
        assert stored(folder, path.name).read_bytes() == path.read_bytes()


def test_a_release_that_changes_while_it_is_served_makes_no_student_and_is_refused(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("isthmus.cloud.server._CHECK_RELEASE_S", 0.05)
    release = tmp_path / "release"
    shutil.copytree(rig.release, release)
    replaced: list[None] = []
    monkeypatch.setattr(Supervisor, "replace", lambda self: replaced.append(None))

    async def scenario() -> None:
        changing = type(rig)(release, rig.state)
        async with changing.running(workers=1) as (_, channel):
            device = await rig.enrol(channel)
            flipped(release / "teacher" / "teacher.safetensors")
            while not replaced:
                await asyncio.sleep(0.02)
            job = await rig.start(device)
        worker = Worker(changing.settings())
        with pytest.raises(Unusable, match=r"teacher\.safetensors was changed"):
            worker.run_once()
        assert leases.is_due(worker.database, time.time())
        assert [row.job_id for row in job_rows.listing(worker.database)] == [job.job_id]
        worker.database.close()

    asyncio.run(scenario())
    assert "teacher.safetensors was changed" in caplog.text
    shutil.copy2(rig.release / "teacher" / "teacher.safetensors", release / "teacher")
    (release / "base" / "measured.json").write_text("{}")
    assert "measured.json was changed" in refusal(type(rig)(release, rig.state))

    async def accepting() -> None:
        async with type(rig)(release, rig.state).running(accept_release=True):
            pass

    asyncio.run(accepting())


def test_damaged_files_of_a_student_are_not_sent_and_its_heads_not_used(rig: Any) -> None:
    async def scenario() -> list[grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            student_id = (await device.describe()).student_id
            for name in ("audio_encoder.onnx", "heads.safetensors"):
                flipped(stored(rig.state / "artefacts" / student_id, name))
            fetch = pb.FetchStudentRequest(student_id=student_id, file_name="audio_encoder.onnx")
            metadata = (*device.metadata, ("isthmus-student", student_id))
            return [
                (await rig.refusal(device.personalisation.FetchStudent(fetch, metadata=device.metadata)))[0],
                (await rig.refusal(device.inference.Infer(iter(()), metadata=metadata)))[0],
            ]

    assert asyncio.run(scenario()) == [grpc.StatusCode.DATA_LOSS] * 2


def test_the_second_server_says_who_holds_the_folder(rig: Any) -> None:
    async def scenario() -> str:
        async with rig.running():
            with pytest.raises(Locked) as refused:
                async with rig.running():
                    pass
            return str(refused.value)

    assert f"process {os.getpid()} on " in asyncio.run(scenario())
