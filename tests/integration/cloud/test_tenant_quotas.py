"""Quotas of tenants on a real server: what is beyond them is refused with the way out, and nobody else notices."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import generate_latest

from isthmus.cloud.store import devices, tenants
from isthmus.cloud.store.tenants import Quotas, Tenant
from isthmus.proto.v1 import elastic_pb2
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.tenants import frame, shared
from tests.rigs.elastic.server import THREE

EXHAUSTED, UNAUTHENTICATED = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED


def test_a_quota_of_zero_allows_nothing_and_each_refusal_says_what_to_do(tiny_release: Path, tmp_path: Path) -> None:
    zero = Quotas(0, 0, 0, None, 0)

    async def scenario() -> list[tuple[grpc.StatusCode, str]]:
        async with shared(tmp_path, tiny_release, {"a": zero, "b": Quotas(queries_per_s=0.0)}) as on:
            rig = on.rig
            refusals = [await rig.refusal(on.enrol("a")), await rig.refusal(on.enrol("b"))]
            device = await rig.enrol(on.channel)
            with on.database.writing() as connection:
                connection.exec_driver_sql("UPDATE devices SET tenant = 'a'")
            refusals.append(await rig.refusal(device.describe()))
            tenants.put(on.database, Tenant("a", 1.0, replace(zero, bytes_per_day=None)))
            await asyncio.to_thread(on.server.roster.refresh)
            refusals.append(await rig.refusal(rig.start(device)))
            refusals.append(await rig.refusal(on.elastic.RegisterTask(THREE[0].messages(), metadata=on.key("a"))))
            listing = elastic_pb2.ListTasksRequest()
            refusals.append(await rig.refusal(on.elastic.ListTasks(listing, metadata=on.key("b"))))
            # Tenants without quotas are served.
            other = await rig.enrol(on.channel)
            assert (await other.describe()).student_id
            return refusals

    refusals = asyncio.run(scenario())
    assert {code for code, _ in refusals} == {EXHAUSTED}
    wanted = (
        "devices",
        "queries per second",
        "bytes per day",
        "personalisations per day",
        "tasks",
        "queries per second",
    )
    for (_, message), what in zip(refusals, wanted, strict=True):
        assert f"quota of {what} is used up" in message and ("operator" in message or "try again" in message)


def test_frames_and_calls_beyond_the_rate_are_refused_and_other_tenants_are_not(
    tiny_release: Path, tmp_path: Path
) -> None:
    async def scenario() -> tuple[list[int], int, dict[Any, int]]:
        async with shared(tmp_path, tiny_release, {"a": Quotas(queries_per_s=0.001)}) as on:
            noisy, other = await on.enrol("a"), await on.enrol("b")
            on.server.roster._buckets.clear()  # enrolling took the one call that "a" may make at once
            manifest = await other.describe()
            asked = [pb.InferRequest(sequence=number, frame=frame(manifest)) for number in (1, 2, 3)]
            codes = []
            for device in (other, noisy):
                metadata = (*device.metadata, ("isthmus-student", manifest.student_id))
                replies = [each async for each in device.inference.Infer(iter(asked), metadata=metadata)]
                codes += [each.error.code for each in replies]
            refusal = await on.rig.refusal(noisy.describe())
            assert refusal[0] is EXHAUSTED and "try again in" in refusal[1]
            assert (await other.describe()).student_id == manifest.student_id
            calls, refused = on.server.roster.counted()
            return codes, calls["a"], refused

    codes, calls, refused = asyncio.run(scenario())
    assert codes == [0, 0, 0, 8, 8, 8], "the call that opened the stream was the one that is allowed"
    assert (calls, refused) == (6, {("a", "queries"): 4})


def test_neither_a_revoked_device_nor_a_made_up_method_uses_what_the_tenant_may_ask(
    tiny_release: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with shared(tmp_path, tiny_release, {"a": Quotas(queries_per_s=0.001)}) as on:
            buckets = on.server.roster._buckets  # emptied, "a" may ask once more
            gone = await on.enrol("a")
            buckets.clear()
            device = await on.enrol("a")
            buckets.clear()
            await gone.describe()
            assert devices.revoke(on.database, gone.device_id, 2.0)
            for _ in range(3):
                buckets.clear()
                assert (await on.rig.refusal(gone.describe()))[0] is UNAUTHENTICATED
            assert (await device.describe()).student_id, "the call that is left is the other device's"
            assert (await on.rig.refusal(device.describe()))[0] is EXHAUSTED
            made_up: Any = on.channel.unary_unary("/isthmus.v1.PersonalisationService/MadeUp")
            refusal = await on.rig.refusal(made_up(b"", metadata=device.metadata))
            assert refusal[0] is grpc.StatusCode.UNIMPLEMENTED
            assert b"MadeUp" not in generate_latest(on.server._metrics.registry)

    asyncio.run(scenario())
