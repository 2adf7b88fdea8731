"""Callers without an identity never keep out a device that has one."""

import asyncio
import contextlib
import socket
import time
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import RETRY_KEY
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.rigs.cloud.raw_http2 import ANY_NUMBER, CROWDS, DEVICES, Crowd, RawClient, idle_sockets
from tests.rigs.project.patience import HANGS_S


@contextlib.asynccontextmanager
async def pressed(crowd: Crowd) -> Any:
    """Run the crowd on a thread of its own; yields when its calls are open."""
    stop = False

    def press() -> None:
        while not stop:
            crowd.press()
            time.sleep(0.02)

    thread = asyncio.create_task(asyncio.to_thread(press))
    while crowd.opened < 300:
        await asyncio.sleep(0.02)
    try:
        yield
    finally:
        stop = True
        await thread
        crowd.close()


def test_a_device_a_newcomer_and_a_probe_are_answered_beside_any_crowd(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.cloud.rpc.calls.UNKNOWN_S", HANGS_S)  # a busy machine reads a probe late

    async def scenario() -> None:
        async with rig.running() as (server, channel):
            device = await rig.enrol(channel)
            health: Any = health_pb2_grpc.HealthStub(channel)
            for name, (path, message, announce) in CROWDS.items():
                async with pressed(Crowd(server.port, path, 300, message=message, announce=announce)):
                    for _ in range(10):
                        assert (await device.describe()).kind == "base", name
                        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=HANGS_S)).status, name
                    assert (await rig.enrol(channel, "newcomer")).device_id, name

    asyncio.run(scenario())


def test_a_call_without_a_message_is_ended_and_says_so(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> Any:
        await asyncio.Event().wait()
        yield b""

    async def scenario() -> list[tuple[grpc.StatusCode, str]]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            # From here on only: a busy machine reads the message of the enrolment late.
            monkeypatch.setattr("isthmus.cloud.rpc.calls.UNKNOWN_S", 0.2)
            monkeypatch.setattr("isthmus.cloud.rpc.calls.KNOWN_S", 0.4)
            enrol = channel.stream_unary(DEVICES + "Enrol")(never())
            describe = channel.stream_unary(DEVICES + "DescribeStudent")(never(), metadata=device.metadata)
            return [await rig.refusal(enrol), await rig.refusal(describe)]

    for code, message in asyncio.run(scenario()):
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no message arrived" in message


def test_half_sent_messages_hold_little_memory(rig: Any) -> None:
    """Each of 400 messages announces 1 MiB, of which 64 kB are sent."""

    async def scenario() -> int:
        async with rig.running() as (server, channel):
            device = await rig.enrol(channel)
            client = RawClient(server.port)
            while client.most_streams == ANY_NUMBER:  # until the server has said its settings
                await asyncio.to_thread(client.read, 0.05)
            client.close()
            assert client.most_streams <= 512, "a connection has a bounded number of streams"
            before = psutil.Process().memory_info().rss
            crowd = Crowd(server.port, DEVICES + "Enrol", 400, message=bytes(64_000), announce=1 << 20)
            await asyncio.to_thread(crowd.press)
            for _ in range(10):
                await asyncio.to_thread(crowd.press)
                await device.describe()
            used = psutil.Process().memory_info().rss - before
            crowd.close()
            return used

    assert asyncio.run(scenario()) < 120e6


def test_a_thousand_idle_sockets_keep_nobody_out_and_are_closed(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.cloud.rpc import transport

    usual = transport.options

    def hasty(connections: int, *, elastic: bool) -> tuple[tuple[str, int], ...]:
        """Use the usual bounds, with 1 s instead of 10 s for a handshake."""
        changed = {**dict(usual(connections, elastic=elastic)), "grpc.server_handshake_timeout_ms": 1_000}
        return tuple(changed.items())

    monkeypatch.setattr(transport, "options", hasty)

    async def scenario() -> None:
        async with rig.running() as (server, channel):
            with idle_sockets(server.port, 1_000) as sockets:
                assert (await rig.enrol(channel)).device_id
                for each in sockets:  # each ends by the server's doing, or the test does not end
                    await asyncio.to_thread(read_to_its_end, each)
            assert (await rig.enrol(channel, "later")).device_id

    def read_to_its_end(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4_096):
                pass

    asyncio.run(scenario())


def test_undecodable_messages_are_invalid_and_leave_no_traceback(rig: Any, caplog: pytest.LogCaptureFixture) -> None:
    names = ("Enrol", "StartPersonalisation", "UploadPrototypes", "DescribeStudent", "WatchJob", "FetchStudent")

    async def scenario() -> list[grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            codes = []
            for name in names:
                call = channel.stream_stream(DEVICES + name)(iter([b"\xff" * 200]), metadata=device.metadata)
                codes.append((await rig.refusal(call))[0])
            student_id = (await device.describe()).student_id
            metadata = (*device.metadata, ("isthmus-student", student_id))
            infer = channel.stream_stream("/isthmus.v1.InferenceService/Infer")(iter([b"\xff"]), metadata=metadata)
            codes.append((await rig.refusal(infer))[0])
            return codes

    assert asyncio.run(scenario()) == [grpc.StatusCode.INVALID_ARGUMENT] * 7
    assert "Traceback" not in caplog.text


def test_ids_with_odd_characters_are_refused(rig: Any) -> None:
    async def scenario() -> set[grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            stub, mine = device.personalisation, device.metadata
            codes = set()
            for bad in ("a\0b", "\N{SNOWMAN}", "x" * 65, "../x"):
                upload = pb.UploadPrototypesRequest(job_id=bad, round=1, prototypes=rig.prototypes())
                fetch = pb.FetchStudentRequest(student_id=bad, file_name="a")
                for call in (
                    stub.WatchJob(pb.WatchJobRequest(job_id=bad), metadata=mine),
                    stub.UploadPrototypes(upload, metadata=mine),
                    stub.DescribeStudent(pb.DescribeStudentRequest(student_id=bad), metadata=mine),
                    stub.FetchStudent(fetch, metadata=mine),
                ):
                    codes.add((await rig.refusal(call))[0])
            return codes

    assert asyncio.run(scenario()) <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


def test_the_open_stream_of_a_revoked_device_ends(rig: Any) -> None:
    async def scenario() -> grpc.StatusCode:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            job = await rig.start(device)
            watch = device.personalisation.WatchJob(pb.WatchJobRequest(job_id=job.job_id), metadata=device.metadata)
            assert (await watch.read()).job.job_id == job.job_id
            database = Database(rig.settings().database_url)
            assert devices.revoke(database, device.device_id, now_s=1.0)
            database.close()
            async with asyncio.timeout(HANGS_S):  # it ends within a second, and never by itself
                code, _ = await rig.refusal(watch.read())
            return code

    assert asyncio.run(scenario()) is grpc.StatusCode.UNAUTHENTICATED


def test_a_refusal_says_when_to_try_again(rig: Any) -> None:
    async def scenario() -> grpc.aio.AioRpcError:
        async with rig.running(max_calls_per_device=1) as (_, channel):
            device = await rig.enrol(channel)
            job = await rig.start(device)
            watch = device.personalisation.WatchJob(pb.WatchJobRequest(job_id=job.job_id), metadata=device.metadata)
            await watch.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await device.describe()
            watch.cancel()
            return refused.value

    error = asyncio.run(scenario())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(error.trailing_metadata())[RETRY_KEY]) >= 500


def test_calls_of_a_device_beyond_all_bounds_do_not_stop_another(rig: Any) -> None:
    async def scenario() -> None:
        async with rig.running() as (_, channel):
            greedy, modest = await rig.enrol(channel), await rig.enrol(channel)
            stub = pb_grpc.PersonalisationServiceStub(channel)
            job = await rig.start(greedy)
            request = pb.WatchJobRequest(job_id=job.job_id)
            watches = [stub.WatchJob(request, metadata=greedy.metadata) for _ in range(100)]
            outcomes = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
            assert sum(isinstance(each, grpc.aio.AioRpcError) for each in outcomes) == 100 - 16
            assert (await modest.describe()).kind == "base"
            for watch in watches:
                watch.cancel()

    asyncio.run(scenario())
