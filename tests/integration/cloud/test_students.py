"""Download of students: chunks, offsets, and files that must not be served."""

import asyncio
import zlib
from typing import Any

import grpc
import pytest

from isthmus.cloud.store import releases
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import StorageFull
from isthmus.proto.limits import CHUNK_BYTES, MAX_MESSAGE_BYTES
from isthmus.proto.v1 import isthmus_pb2 as pb

FILE = "audio_encoder.onnx"


def test_a_file_comes_whole_in_checked_chunks_and_from_any_offset(rig: Any, tiny_release: Any) -> None:
    content = (tiny_release / "base" / FILE).read_bytes()
    offsets = (0, 1, CHUNK_BYTES, len(content) - 1, len(content))

    async def scenario() -> list[list[pb.FetchStudentResponse]]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            manifest = await device.describe()
            assert manifest.kind == "base"
            assert {file.name: file.size_bytes for file in manifest.files}[FILE] == len(content)
            fetched = []
            for offset in offsets:
                request = pb.FetchStudentRequest(student_id=manifest.student_id, file_name=FILE, offset_bytes=offset)
                call = device.personalisation.FetchStudent(request, metadata=device.metadata)
                fetched.append([chunk async for chunk in call])
            return fetched

    for offset, chunks in zip(offsets, asyncio.run(scenario()), strict=True):
        assert b"".join(chunk.data for chunk in chunks) == content[offset:]
        assert all(len(chunk.data) <= CHUNK_BYTES and zlib.crc32(chunk.data) == chunk.crc32 for chunk in chunks)
        assert [chunk.offset_bytes for chunk in chunks] == list(range(offset, len(content), CHUNK_BYTES))


def test_a_download_broken_half_way_goes_on_where_it_stopped(rig: Any, tiny_release: Any) -> None:
    async def scenario() -> bytes:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            student_id = (await device.describe()).student_id
            request = pb.FetchStudentRequest(student_id=student_id, file_name=FILE)
            broken = device.personalisation.FetchStudent(request, metadata=device.metadata)
            received = (await broken.read()).data
            broken.cancel()
            request.offset_bytes = len(received)
            async for chunk in device.personalisation.FetchStudent(request, metadata=device.metadata):
                received += chunk.data
            return received

    assert asyncio.run(scenario()) == (tiny_release / "base" / FILE).read_bytes()


def test_only_files_of_the_manifest_can_be_fetched(rig: Any) -> None:
    names = ("heads.safetensors", "../../signing_key", "/etc/passwd", "", ".", "audio_encoder.onnx\0", "x" * 5_000)

    async def scenario() -> list[tuple[grpc.StatusCode, str]]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            student_id = (await device.describe()).student_id
            wrong = [pb.FetchStudentRequest(student_id=student_id, file_name=name) for name in names]
            wrong += [
                pb.FetchStudentRequest(student_id=student_id, file_name=FILE, offset_bytes=offset)
                for offset in (-1, 1 << 40)
            ]
            wrong.append(pb.FetchStudentRequest(student_id="../base", file_name=FILE))
            stub = device.personalisation
            return [await rig.refusal(stub.FetchStudent(request, metadata=device.metadata)) for request in wrong]

    refusals = asyncio.run(scenario())
    codes = [code for code, _ in refusals]
    assert codes[: len(names)] == [grpc.StatusCode.NOT_FOUND] * len(names)
    assert codes[len(names) : -1] == [grpc.StatusCode.INVALID_ARGUMENT] * 2
    assert codes[-1] is grpc.StatusCode.NOT_FOUND
    assert not any(str(rig.state) in message for _, message in refusals)


def test_messages_over_the_bound_are_refused_and_the_server_goes_on(rig: Any) -> None:
    async def scenario() -> grpc.StatusCode:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            request = pb.StartPersonalisationRequest(
                idempotency_key="k", prototypes=pb.Prototypes(values=bytes(MAX_MESSAGE_BYTES))
            )
            call = device.personalisation.StartPersonalisation(request, metadata=device.metadata)
            code, _ = await rig.refusal(call)
            assert (await device.describe()).kind == "base"
            return code

    assert asyncio.run(scenario()) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_student_is_described_although_its_use_cannot_be_recorded(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise StorageFull("the server's disk is full; try again later")

    async def scenario() -> None:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            database = Database(rig.settings().database_url)
            with monkeypatch.context() as patched:
                patched.setattr(releases, "uses", full)
                student_id = (await device.describe()).student_id
                assert student_id.startswith("base-") and set(releases.users(database)) == {""}
            await device.describe()
            assert set(releases.users(database)) == {student_id.removeprefix("base-")}
            database.close()

    asyncio.run(scenario())
