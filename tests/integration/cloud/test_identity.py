"""Who may call, and what each caller may see."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc


def test_calls_without_a_sound_token_are_unauthenticated(rig: Any) -> None:
    async def scenario() -> list[grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            token = device.metadata[0][1].removeprefix("Bearer ")
            stub = pb_grpc.PersonalisationServiceStub(channel)
            request = pb.DescribeStudentRequest()
            wrong = [None, "", token, "Bearer ", f"Bearer {token}x", "Bearer nobody.secret", f"Basic {token}"]
            codes = []
            for value in wrong:
                metadata = None if value is None else (("authorization", value),)
                codes.append((await rig.refusal(stub.DescribeStudent(request, metadata=metadata)))[0])
            stream = pb_grpc.InferenceServiceStub(channel).Infer(iter(()), metadata=(("isthmus-student", "base"),))
            codes.append((await rig.refusal(stream))[0])
            assert await stub.DescribeStudent(request, metadata=device.metadata)
            return codes

    codes = asyncio.run(scenario())
    assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 8


def test_the_enrolment_key_is_asked_for(rig: Any, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("open sesame\n")

    async def scenario() -> list[tuple[grpc.StatusCode, str]]:
        async with rig.running(enrolment_key_file=key_file) as (_, channel):
            refusals = [await rig.refusal(rig.enrol(channel, key=key)) for key in ("", "open", "open sesame ")]
            assert (await rig.enrol(channel, key="open sesame")).device_id
            return refusals

    for code, message in asyncio.run(scenario()):
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "sesame" not in message


def test_names_that_cannot_be_shown_are_refused(rig: Any) -> None:
    async def scenario() -> list[grpc.StatusCode]:
        async with rig.running() as (_, channel):
            return [(await rig.refusal(rig.enrol(channel, name)))[0] for name in ("x" * 65, "a\nb", "\x1b[2J")]

    assert asyncio.run(scenario()) == [
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INVALID_ARGUMENT,
    ]


def test_the_database_holds_no_token_and_a_revoked_device_is_shut_out(rig: Any) -> None:
    async def scenario() -> tuple[str, grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            database = Database(rig.settings().database_url)
            assert devices.revoke(database, device.device_id, now_s=1.0)
            database.close()
            call = device.personalisation.DescribeStudent(pb.DescribeStudentRequest(), metadata=device.metadata)
            return device.metadata[0][1], (await rig.refusal(call))[0]

    bearer, code = asyncio.run(scenario())
    assert code is grpc.StatusCode.UNAUTHENTICATED
    secret = bearer.rpartition(".")[2].encode()
    files = [path for path in rig.state.rglob("*") if path.is_file()]
    assert files
    assert not any(secret in path.read_bytes() for path in files)


def test_anothers_student_and_job_do_not_exist(rig: Any) -> None:
    async def scenario() -> list[tuple[grpc.StatusCode, str]]:
        async with rig.running() as (_, channel):
            owner, other = await rig.enrol(channel, "owner"), await rig.enrol(channel, "other")
            job = await rig.start(owner)
            stub, mine = other.personalisation, other.metadata
            refusals = []
            for job_id in (job.job_id, "no-such-job"):
                refusals.append(await rig.refusal(stub.WatchJob(pb.WatchJobRequest(job_id=job_id), metadata=mine)))
                upload = pb.UploadPrototypesRequest(job_id=job_id, round=1, prototypes=rig.prototypes())
                refusals.append(await rig.refusal(stub.UploadPrototypes(upload, metadata=mine)))
            return refusals

    watched, uploaded, *unknown = asyncio.run(scenario())
    assert watched[0] is uploaded[0] is grpc.StatusCode.NOT_FOUND
    assert [watched, uploaded] == unknown, "another's job looks exactly like one that is not there"


def test_manifests_are_signed_with_the_key_that_enrolment_gave_and_it_stays(rig: Any) -> None:
    async def scenario() -> tuple[bytes, pb.DescribeStudentResponse]:
        async with rig.running() as (_, channel):
            stub = pb_grpc.PersonalisationServiceStub(channel)
            enrolled = await stub.Enrol(pb.EnrolRequest(device_name="a"))
            metadata = (("authorization", f"Bearer {enrolled.token}"),)
            described = await stub.DescribeStudent(pb.DescribeStudentRequest(), metadata=metadata)
            return enrolled.signing_public_key, described

    first, second = asyncio.run(scenario()), asyncio.run(scenario())
    key, described = first
    Ed25519PublicKey.from_public_bytes(key).verify(described.signature, described.manifest)
    assert second[0] == key
    assert stat.S_IMODE((rig.state / "signing_key").stat().st_mode) == 0o600
    (rig.state / "signing_key").chmod(0o644)
    with pytest.raises(Exception, match="chmod 600"):
        asyncio.run(scenario())


def test_health_and_reflection_need_no_token(rig: Any) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def scenario() -> tuple[int, list[str]]:
        async with rig.running() as (_, channel):
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
            names = [service.name async for answer in answers for service in answer.list_services_response.service]
            return health.status, names

    status, names = asyncio.run(scenario())
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert "isthmus.v1.PersonalisationService" in names
    assert "isthmus.v1.InferenceService" in names
