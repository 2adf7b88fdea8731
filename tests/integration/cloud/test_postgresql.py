"""The store on PostgreSQL, in a cluster that the tests start themselves."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import Job, Selected, Taken, Uploaded
from isthmus.cloud.store import devices, lock
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.schema import metadata
from isthmus.proto.errors import IsthmusError, Locked, Unavailable, WrongState
from isthmus.proto.messages import Stage
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.postgres import Cluster, running_cluster


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
    assert job_rows.get(database, "job") == job == job_rows.next_runnable(database, time.time())
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


def test_one_server_and_one_worker_may_hold_the_locks(database: Database) -> None:
    held = lock.acquire(database, "server")
    with pytest.raises(Locked):
        lock.acquire(database, "server")
    lock.acquire(database, "worker").release()
    held.release()
    lock.acquire(database, "server").release()


def test_a_whole_server_runs_on_postgresql(database: Database, rig: Any) -> None:
    url = database.url.render_as_string(hide_password=False)

    async def scenario() -> pb.JobStatus:
        async with rig.running(database=url) as (_, channel):
            with pytest.raises(Locked):
                async with rig.running(database=url, state=rig.state.with_name("other")):
                    pass
            device = await rig.enrol(channel)
            assert (await device.describe()).kind == "base"
            return await rig.start(device)

    job = asyncio.run(scenario())
    stored = job_rows.get(database, job.job_id)
    assert stored is not None and stored.stage is Stage.QUEUED


@pytest.mark.usefixtures("cluster")
def test_an_unreachable_database_is_reported_as_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"), Database("postgresql://127.0.0.1:1/x").reading():
        pass


def cut_locks(cluster: Cluster) -> None:
    """End every connection that holds an advisory lock, as a broken network would."""
    cluster.sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether ``condition`` becomes true within ``seconds``."""
    until_s = time.monotonic() + seconds
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.05)
    return condition()


def test_a_lost_lock_is_noticed_taken_again_and_keeps_others_out(cluster: Cluster, database: Database) -> None:
    held = lock.acquire(database, "server")
    held.fence(database)
    first_epoch = held.epoch
    cut_locks(cluster)
    assert until(lambda: not held.held), "the loss is noticed"
    with pytest.raises(Unavailable, match="lost its lock"):
        devices.revoke(database, "dev", 1.0)
    assert devices.get(database, "dev") is not None, "reading goes on"
    assert until(lambda: held.held), "and taken again"
    assert devices.revoke(database, "dev", 1.0)
    assert first_epoch is not None and held.epoch == first_epoch + 1
    with pytest.raises(Locked):
        lock.acquire(database, "server")
    held.release()


def test_writes_of_a_holder_that_was_overtaken_are_fenced(cluster: Cluster, database: Database) -> None:
    held = lock.acquire(database, "server")
    held.fence(database)
    worker = Database(database.url.render_as_string(hide_password=False))
    assert held.epoch is not None
    worker.guard = lock.Fence("server", held.epoch)
    other = Database(database.url.render_as_string(hide_password=False))
    cut_locks(cluster)
    overtaking = lock.acquire(other, "server")  # before the first has noticed
    overtaking.fence(other)
    with pytest.raises(Unavailable):
        devices.revoke(database, "dev", 1.0)
    with pytest.raises(Locked, match="taken over"):
        devices.revoke(worker, "dev", 1.0)
    assert until(lambda: not held.held)
    time.sleep(2.5)
    assert not held.held, "the lock is another's now"
    assert devices.revoke(other, "dev", 1.0)
    overtaking.release()
    assert until(lambda: held.held), "free again, it is taken again"
    with pytest.raises(Locked):
        devices.revoke(worker, "dev", 1.0)
    for each in (held, worker, other):
        each.release() if hasattr(each, "release") else each.close()


def test_a_restarted_database_is_served_again(cluster: Cluster, database: Database, rig: Any) -> None:
    url = database.url.render_as_string(hide_password=False)

    async def scenario() -> None:
        async with rig.running(database=url) as (_, channel):
            device = await rig.enrol(channel)
            await asyncio.to_thread(cluster.stop)
            assert (await rig.refusal(device.describe()))[0] is grpc.StatusCode.UNAVAILABLE
            await asyncio.to_thread(cluster.start)
            until_s = time.monotonic() + 120
            while True:
                try:
                    assert (await rig.enrol(channel, "again")).device_id
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    assert time.monotonic() < until_s
                    await asyncio.sleep(0.2)

    asyncio.run(scenario())
