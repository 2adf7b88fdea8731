"""The store on PostgreSQL, in a cluster that the tests start themselves."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from isthmus.cloud.commands.working import work
from isthmus.cloud.personalise import job_rows, leases, signing
from isthmus.cloud.personalise.job import Job, Selected, Taken, Uploaded
from isthmus.cloud.store import database as database_module
from isthmus.cloud.store import devices, news, pins
from isthmus.cloud.store.database import OLD_WORKERS, OURS, Database
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.schema import jobs, metadata
from isthmus.proto.errors import InvalidInput, IsthmusError, Unavailable, WrongState
from isthmus.proto.messages import Stage
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.postgres import Cluster, running_cluster
from tests.rigs.cloud.service import Client
from tests.rigs.project.patience import HANGS_S


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    """A migrated database of the test's own."""
    with cluster.database() as opened:
        opened.migrate()
        devices.add(opened, Device("dev", "kiosk", bytes(32), 1.0), at_most=9)
        yield opened


def a_job(job_id: str) -> Job:
    return Job(job_id, "dev", f"key {job_id}", "release", 2**31 - 1, 2, time.time(), time.time())


def test_migrations_lead_to_the_schema(database: Database) -> None:
    database.migrate()
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_jobs_come_back_as_they_were_stored(database: Database) -> None:
    created, new = job_rows.create(database, a_job("job"), b"\x00\xff", at_most_waiting=9)
    assert new
    assert job_rows.get(database, "job") == created
    assert job_rows.payload(database, "job", 0) == b"\x00\xff"
    job_rows.apply(database, "job", Taken(), time.time())
    job, _ = job_rows.apply(database, "job", Selected((3, 0)), time.time())
    assert job_rows.get(database, "job") == job
    with pytest.raises(WrongState):
        job_rows.apply(database, "job", Uploaded(1), time.time())


def test_of_two_jobs_started_at_once_by_one_device_one_is_refused(database: Database) -> None:
    outcomes: list[object] = []

    def start(job_id: str) -> None:
        try:
            outcomes.append(job_rows.create(database, a_job(job_id), b"", at_most_waiting=9)[0].job_id)
        except IsthmusError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=start, args=(f"job{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(WrongState) == 3
    assert len(job_rows.listing(database)) == 1


def test_two_servers_on_one_database_both_answer_and_know_each_others_devices(database: Database, rig: Any) -> None:
    url = database.url.render_as_string(hide_password=False)
    files = str(rig.state.with_name("files"))
    second = type(rig)(rig.release, rig.state.with_name("second"))

    async def scenario() -> tuple[pb.JobStatus, pb.JobStatus]:
        async with rig.running(database=url, artefacts=files) as (_, channel):
            with pytest.raises(InvalidInput, match="copy it to"):
                async with second.running(database=url, artefacts=files):
                    pass
            key = rig.state / "signing_key"
            with pytest.raises(InvalidInput, match="the same --artefacts"):
                async with second.running(database=url, signing_key_file=key):
                    pass
            async with second.running(database=url, artefacts=files, signing_key_file=key) as (_, other):
                here, there = await rig.enrol(channel), await second.enrol(other)
                known_here = Client(there.device_id, channel, there.metadata)
                known_there = Client(here.device_id, other, here.metadata)
                assert (await known_here.describe()) == (await known_there.describe())
                return await rig.start(known_here), await second.start(known_there)

    started = asyncio.run(scenario())
    assert {job.job_id for job in job_rows.listing(database)} == {job.job_id for job in started}
    assert {job.stage for job in job_rows.listing(database)} == {Stage.QUEUED}


def test_servers_that_start_at_once_make_the_tables_once(cluster: Cluster) -> None:
    with cluster.database() as empty:
        others = [Database(empty.url.render_as_string(hide_password=False)) for _ in range(3)]
        with ThreadPoolExecutor(len(others)) as pool:
            assert list(pool.map(lambda other: other.migrate(), others)) == [None] * len(others)
        empty.check_schema()  # Raises if a table is missing or another one than this version's.
        for other in others:
            other.close()


def test_a_server_of_the_version_before_goes_on_while_this_one_serves(database: Database) -> None:
    """Version 0.1 writes no column of this version, and its worker holds an advisory lock."""
    job_rows.create(database, a_job("new"), b"", at_most_waiting=9)
    devices.add(database, Device("dev2", "", bytes(32), 1.0), at_most=9)
    with database.writing() as connection:
        connection.execute(jobs.insert().values({**job_rows.row_of(a_job("old")), "device_id": "dev2"}))
    with database.reading() as old_worker:
        old_worker.exec_driver_sql(f"SELECT pg_advisory_xact_lock({OURS}, {OLD_WORKERS})")
        assert leases.take(database, "w", releases=("release",), now_s=time.time()) is None, "its worker is at work"
    assert leases.take(database, "w", releases=("release",), now_s=time.time()) is not None


@pytest.mark.parametrize("skew_s", [600.0, -600.0])
def test_machines_whose_clocks_differ_by_ten_minutes_agree_on_leases(
    cluster: Cluster, database: Database, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    job_rows.create(database, a_job("job"), b"", at_most_waiting=9)
    held = leases.take(database, "first", releases=("release",), now_s=database.now_s())
    assert held is not None
    other = Database(database.url.render_as_string(hide_password=False))
    true = time.time
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(time, "time", lambda: true() + skew_s)
        other.connect()
        assert abs(other.now_s() - true()) < 60, "its time is the database's"
        assert not leases.is_due(other, other.now_s())
        assert leases.take(other, "second", releases=("release",), now_s=other.now_s()) is None
        leases.died(other, "first")
        taken = leases.take(other, "second", releases=("release",), now_s=other.now_s())
        assert taken is not None and taken.lease.fence == held.lease.fence + 1
    with pytest.raises(leases.LeaseLost):
        leases.extend(database, held.lease)
    other.close()


def test_two_versions_serve_one_database_at_once(database: Database) -> None:
    """The version before names the columns that it knows. What it writes belongs to the default tenant."""
    with database.writing() as connection:
        connection.exec_driver_sql(
            "INSERT INTO devices (id, name, token_hash, created_s) VALUES ('old', 'kiosk', '\\x00', 1.0)"
        )
        before = {**job_rows.row_of(a_job("old")), "device_id": "old"}
        connection.execute(jobs.insert().values(before))
    devices.add(database, Device("acme-1", "", bytes(32), 1.0, tenant="acme"), at_most=9)
    assert {each.device_id: each.tenant for each in devices.listing(database)} == {
        "dev": "default",
        "old": "default",
        "acme-1": "acme",
    }
    held = leases.take(database, "w", releases=("release",), now_s=database.now_s())
    assert held is not None and (held.tenant, held.trace) == ("default", "")


def test_a_new_job_wakes_workers_on_other_machines(database: Database) -> None:
    heard = threading.Semaphore(0)
    stop = news.listen(database, job_rows.CHANNEL, heard.release)
    assert heard.acquire(timeout=HANGS_S), "a listener looks once before it waits"
    job_rows.create(database, a_job("job"), b"", at_most_waiting=9)
    assert heard.acquire(timeout=HANGS_S)
    stop.set()


@pytest.mark.usefixtures("cluster")
def test_an_unreachable_database_is_reported_as_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"), Database("postgresql://127.0.0.1:1/x").reading():
        pass


def test_a_restarted_database_is_served_again(cluster: Cluster, database: Database, rig: Any) -> None:
    url = database.url.render_as_string(hide_password=False)

    async def scenario() -> None:
        async with rig.running(database=url) as (_, channel):
            device = await rig.enrol(channel)
            await asyncio.to_thread(cluster.stop)
            assert (await rig.refusal(device.describe()))[0] is grpc.StatusCode.UNAVAILABLE
            await asyncio.to_thread(cluster.start)
            until_s = time.monotonic() + HANGS_S
            while True:
                try:
                    assert (await rig.enrol(channel, "again")).device_id
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    assert time.monotonic() < until_s
                    await asyncio.sleep(0.2)

    asyncio.run(scenario())


def test_connections_that_were_idle_while_the_database_restarted_are_replaced(
    cluster: Cluster, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_IDLE_S", 0.0)
    with database.reading(), database.reading():
        pass  # two connections are kept
    cluster.stop()
    with pytest.raises(Unavailable):
        devices.get(database, "dev")
    cluster.start()
    found = devices.get(database, "dev")
    assert found is not None
    with database.writing() as connection, database.reading():
        connection.execute(jobs.delete())
    monkeypatch.setattr(database_module, "_IDLE_S", 3600.0)
    cluster.stop()
    cluster.start()
    with pytest.raises(Unavailable, match="try again later"):
        devices.get(database, "dev")
    assert devices.get(database, "dev") == found, "one call that fails replaces them all"


def test_a_worker_of_its_own_needs_what_it_shares_with_the_servers(database: Database, rig: Any) -> None:
    url = database.url.render_as_string(hide_password=False)
    rig.state.mkdir()
    key = rig.state.with_name("key")
    signing.load_or_create(key)
    with pytest.raises(InvalidInput, match="no server has used"):
        work(rig.settings(database=url, signing_key_file=key))
    pins.put_once(database, "id", bytes(16))
    for settings, hint in (
        (rig.settings(signing_key_file=key), "postgresql://"),
        (rig.settings(database=url), "copy it to"),
        (rig.settings(database=url, signing_key_file=key), "the same --artefacts"),
    ):
        with pytest.raises(InvalidInput, match=hint):
            work(settings)
