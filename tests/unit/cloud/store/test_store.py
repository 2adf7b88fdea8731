"""The database, its locks, and the artefacts, also when the disk is full."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import EpochDone, Job, Selected, Taken
from isthmus.cloud.store import devices, lock
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.schema import metadata
from isthmus.proto.errors import Busy, InvalidInput, Locked, NotYours, StorageFull, WrongState


@pytest.fixture
def database(tmp_path: Path) -> Database:
    opened = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    opened.migrate()
    devices.add(opened, Device("dev", "kiosk", bytes(32), 1.0), at_most=9)
    return opened


def a_job(job_id: str = "job", created_s: float = 1.0) -> Job:
    return Job(job_id, "dev", f"key {job_id}", "release", 7, 1, created_s, created_s)


def test_migrations_lead_to_the_schema_and_may_run_again(database: Database) -> None:
    database.migrate()
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_schema_that_is_not_this_versions_is_refused_with_the_way_out(tmp_path: Path) -> None:
    opened = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    with pytest.raises(InvalidInput, match=r"older version of Isthmus\. Start 'isthmus cloud serve'"):
        opened.check_schema()
    opened.migrate()
    opened.check_schema()
    with opened.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(InvalidInput, match="older version"):
        opened.check_schema()
    with opened.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for opening in (opened.check_schema, opened.migrate):
        with pytest.raises(InvalidInput, match=r"newer version of Isthmus\. Run that version"):
            opening()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://h/x", "nonsense", ""])
def test_other_databases_are_refused_with_the_way_out(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"sqlite:///|must be a file"):
        Database(url)


def test_a_job_comes_back_as_it_was_stored(database: Database) -> None:
    job_rows.create(database, a_job(), b"upload", at_most_waiting=9)
    stepped = a_job()
    for event in (Taken(), Selected((4, 5)), EpochDone(1, 3)):
        stepped, _ = job_rows.apply(database, "job", event, 3.5)
    assert job_rows.get(database, "job") == stepped
    assert stepped.selected_per_class == (4, 5)
    assert job_rows.payload(database, "job", 0) == b"upload"


def test_an_event_that_does_not_fit_changes_nothing(database: Database) -> None:
    job_rows.create(database, a_job(), b"upload", at_most_waiting=9)
    with pytest.raises(WrongState):
        job_rows.apply(database, "job", EpochDone(1, 3), 3.5)
    assert job_rows.get(database, "job") == a_job()
    with pytest.raises(NotYours):
        job_rows.apply(database, "another", Taken(), 3.5)


def test_a_full_database_is_reported_as_a_full_disk(database: Database) -> None:
    with pytest.raises(StorageFull), database.writing() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        connection.execute(sa.text("CREATE TABLE t (x BLOB)"))
        connection.execute(sa.text("INSERT INTO t VALUES (zeroblob(1000000))"))
    assert devices.get(database, "dev") is not None


def test_a_lock_is_one_processs_and_falls_when_it_is_killed(database: Database) -> None:
    program = (
        "import sys, time\n"
        "from isthmus.cloud.store import lock\n"
        "from isthmus.cloud.store.database import Database\n"
        "held = lock.acquire(Database(sys.argv[1]), 'server')\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    url = database.url.render_as_string()
    with subprocess.Popen(
        [sys.executable, "-c", program, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Locked, match="another server"):
            lock.acquire(database, "server")
        lock.acquire(database, "worker").release()
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock.acquire(database, "server").release()


@pytest.fixture
def artefacts(tmp_path: Path) -> Artefacts:
    return Artefacts(str(tmp_path / "a"))


def test_a_full_disk_leaves_no_half_file(artefacts: Artefacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"new" * 1_000)
    known = artefacts.put("student", "x.onnx", source)

    def full(_: Any, writer: io.BufferedIOBase, *__: object) -> None:
        writer.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    for name in ("x.onnx", "y.onnx"):
        with pytest.raises(StorageFull, match="disk is full"):
            artefacts.put("student", name, source)
    assert artefacts.names("student") == [f"x.onnx.{known.hex()}"]
    assert len(list((tmp_path / "a" / "student").iterdir())) == 1
    assert artefacts.read("student", "x.onnx", known, 4_000) == b"new" * 1_000


def test_devices_that_never_called_make_room_and_rates_are_bounded(database: Database) -> None:
    def add(device_id: str, now_s: float, **bounds: int) -> None:
        devices.add(database, Device(device_id, "", bytes(32), now_s), **{"at_most": 3, **bounds})

    add("seen", 10.0)
    devices.saw(database, "seen", 11.0)
    add("unseen", 20.0)
    with pytest.raises(Busy, match="no more devices"):
        add("new", 3_000.0)
    add("new", 4_000.0)
    assert [device.device_id for device in devices.listing(database)] == ["seen", "new"]
    with pytest.raises(Busy, match="last hour") as refused:
        add("another", 4_001.0, at_most=99, at_most_per_hour=1)
    assert refused.value.retry_after_s
    add("another", 8_000.0, at_most=99, at_most_per_hour=1)
    assert devices.revoke_enrolled_since(database, 4_000.0, 8_001.0) == 2
    assert devices.revoked_among(database, ["seen", "new", "nobody"]) == ["new", "nobody"]
