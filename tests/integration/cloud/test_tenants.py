"""Tenants on a real server: nothing of one is reached by another, by any RPC, and who is shut out is out at once."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.cloud import server as server_module
from isthmus.cloud.store import devices, students, tenants
from isthmus.cloud.store.students import StudentRow
from isthmus.cloud.store.tenants import Tenant
from isthmus.proto.messages import SignedManifest
from isthmus.proto.open_inference import inference_pb2 as oip
from isthmus.proto.v1 import elastic_pb2
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.tenants import frame, shared
from tests.rigs.elastic.server import THREE, pixels, png
from tests.rigs.project.patience import HANGS_S

NOT_FOUND, UNAUTHENTICATED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED


def test_nothing_of_one_tenant_is_reached_by_another_by_any_rpc(tiny_release: Path, tmp_path: Path) -> None:
    async def scenario() -> tuple[dict[str, grpc.StatusCode], list[str]]:
        async with shared(tmp_path, tiny_release) as on:
            rig, refused = on.rig, {}
            ours, theirs = await on.enrol("a"), await on.enrol("b")
            assert {each.device_id: each.tenant for each in devices.listing(on.database)} == {
                ours.device_id: "a",
                theirs.device_id: "b",
            }
            job = await rig.start(ours)
            row = StudentRow("student-a", ours.device_id, "final", SignedManifest(b"m", b"s"), 1.0)
            students.put(on.database, row)
            by = theirs.personalisation

            async def refuse(name: str, call: Any) -> None:
                refused[name] = (await rig.refusal(call))[0]

            upload = pb.UploadPrototypesRequest(job_id=job.job_id, round=0, prototypes=rig.prototypes())
            await refuse("UploadPrototypes", by.UploadPrototypes(upload, metadata=theirs.metadata))
            watch = pb.WatchJobRequest(job_id=job.job_id)
            await refuse("WatchJob", by.WatchJob(watch, metadata=theirs.metadata))
            describe = pb.DescribeStudentRequest(student_id="student-a")
            await refuse("DescribeStudent", by.DescribeStudent(describe, metadata=theirs.metadata))
            fetch = pb.FetchStudentRequest(student_id="student-a", file_name="audio_encoder.onnx")
            await refuse("FetchStudent", by.FetchStudent(fetch, metadata=theirs.metadata))
            of_a = (*theirs.metadata, ("isthmus-student", "student-a"))
            await refuse("Infer", theirs.inference.Infer(iter(()), metadata=of_a))
            # Starting and forgetting concern the caller's own device alone, whatever it sends.
            assert (await rig.start(theirs, "k1")).job_id != job.job_id
            await by.Forget(pb.ForgetRequest(), metadata=theirs.metadata)
            assert devices.get(on.database, ours.device_id) is not None
            # Enrolling with the key of "b" made a device of "b", above. A made-up key makes none.
            assert (await rig.refusal(rig.enrol(on.channel, key="x")))[0] is UNAUTHENTICATED

            a, b = on.key("a"), on.key("b")
            image, made = png(pixels(0)), THREE[0]
            task = made.spec.name
            await on.elastic.RegisterTask(made.messages(), metadata=a)
            query = elastic_pb2.MakeQueryRequest(task=task, encoded=image)
            assert (await on.elastic.MakeQuery(query, metadata=a)).class_name
            for name in (task, f"a/{task}", f"/a/{task}"):
                named = elastic_pb2.MakeQueryRequest(task=name, encoded=image)
                await refuse("MakeQuery", on.elastic.MakeQuery(named, metadata=b))
                for call, message in (
                    ("ModelMetadata", oip.ModelMetadataRequest(name=name)),
                    ("ModelConfig", oip.ModelConfigRequest(name=name)),
                    ("ModelStatistics", oip.ModelStatisticsRequest(name=name)),
                    ("ModelInfer", oip.ModelInferRequest(model_name=name)),
                ):
                    await refuse(call, getattr(on.inference, call)(message, metadata=b))
                ready = await on.inference.ModelReady(oip.ModelReadyRequest(name=name), metadata=b)
                assert not ready.ready
                streamed = on.inference.ModelStreamInfer(iter([oip.ModelInferRequest(model_name=name)]), metadata=b)
                assert ["no task" in reply.error_message async for reply in streamed] == [True]
            await refuse("RemoveTask", on.elastic.RemoveTask(elastic_pb2.RemoveTaskRequest(name=task), metadata=b))
            assert not (await on.elastic.ListTasks(elastic_pb2.ListTasksRequest(), metadata=b)).tasks
            assert not (await on.inference.RepositoryIndex(oip.RepositoryIndexRequest(), metadata=b)).models
            assert not (await on.inference.ModelStatistics(oip.ModelStatisticsRequest(), metadata=b)).model_stats
            # The same name at "b" is another task; removing it leaves that of "a".
            await on.elastic.RegisterTask(
                replace(THREE[1], spec=replace(THREE[1].spec, name=task)).messages(), metadata=b
            )
            assert (await on.elastic.MakeQuery(query, metadata=b)).class_name.startswith("pair-")
            assert (await on.elastic.MakeQuery(query, metadata=a)).class_name.startswith("ten-")
            await on.elastic.RemoveTask(elastic_pb2.RemoveTaskRequest(name=task), metadata=b)
            kept = await on.elastic.ListTasks(elastic_pb2.ListTasksRequest(), metadata=a)
            assert [each.description.name for each in kept.tasks] == [task]
            # A key to enrol asks for no image, and a key to ask enrols nobody.
            enrol_key = (("authorization", "Bearer a-enrol"),)
            assert (await rig.refusal(on.elastic.MakeQuery(query, metadata=enrol_key)))[0] is UNAUTHENTICATED
            assert (await rig.refusal(rig.enrol(on.channel, key="a-query")))[0] is UNAUTHENTICATED
            files = (pb.DESCRIPTOR, elastic_pb2.DESCRIPTOR, oip.DESCRIPTOR)
            services = [service for file in files for service in file.services_by_name.values()]
            return refused, [method.name for service in services for method in service.methods]

    refused, methods = asyncio.run(scenario())
    # Those that name nothing of another tenant, or are asked above in another way.
    own = {"Enrol", "StartPersonalisation", "Forget", "RegisterTask", "ListTasks", "RepositoryIndex", "ModelReady"}
    own |= {"ModelStreamInfer", "ServerLive", "ServerReady", "ServerMetadata"}
    assert set(methods) == set(refused) | own, "each RPC is asked for another tenant's here"
    assert set(refused.values()) == {NOT_FOUND}


def test_a_key_of_no_tenant_enrols_nobody_although_anyone_may_enrol_without(tiny_release: Path, tmp_path: Path) -> None:
    async def scenario() -> tuple[tuple[grpc.StatusCode, str], list[str]]:
        async with shared(tmp_path, tiny_release) as on:
            refusal = await on.rig.refusal(on.rig.enrol(on.channel, key="a-enrol-mistyped"))
            await on.rig.enrol(on.channel)
            await on.enrol("a")
            for name in ("a", "b"):  # until the operator makes new ones, no tenant has a key
                tenants.remove_keys(on.database, name, before_s=2.0)
            on.server.roster.refresh()
            assert (await on.rig.refusal(on.enrol("a")))[0] is UNAUTHENTICATED
            return refusal, sorted(device.tenant for device in devices.listing(on.database))

    (code, message), owners = asyncio.run(scenario())
    assert code is UNAUTHENTICATED and "ask the operator" in message
    assert owners == ["a", "default"]


@pytest.mark.parametrize("how", ["revoke", "close"])
def test_a_device_is_out_in_mid_stream_when_it_is_revoked_or_its_tenant_is_closed(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(server_module, "_REVOKED_S", 0.01)

    async def scenario() -> list[tuple[grpc.StatusCode, str]]:
        async with shared(tmp_path, tiny_release) as on:
            device, other = await on.enrol("a"), await on.enrol("b")
            manifest = await device.describe()
            streams = []
            for each in (device, other):
                metadata = (*each.metadata, ("isthmus-student", manifest.student_id))
                stream = each.inference.Infer(metadata=metadata)
                await stream.write(pb.InferRequest(sequence=1, frame=frame(manifest)))
                assert (await stream.read()).probabilities
                streams.append(stream)
            if how == "revoke":
                assert devices.revoke(on.database, device.device_id, 2.0)
            else:
                tenants.put(on.database, Tenant("a", 1.0, closed_s=2.0))
            async with asyncio.timeout(HANGS_S):  # the stream has no end of its own
                refusals = [await on.rig.refusal(streams[0].read())]
            refusals += [await on.rig.refusal(device.describe())]
            if how == "close":
                query = elastic_pb2.ListTasksRequest()
                refusals.append(await on.rig.refusal(on.elastic.ListTasks(query, metadata=on.key("a"))))
            await streams[1].write(pb.InferRequest(sequence=2, frame=frame(manifest)))
            assert (await streams[1].read()).probabilities, "the other tenant's stream goes on"
            return refusals

    assert {code for code, _ in asyncio.run(scenario())} == {UNAUTHENTICATED}
