"""Damaged, foreign or newer files in the state folder: one line that names the file and a way out, no traceback."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from isthmus.cloud.commands.cloud import app
from isthmus.proto.errors import InvalidInput
from tests.rigs.certificate import write_certificate


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
