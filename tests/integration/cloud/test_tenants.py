"""Tenants on a real server: nothing of one is reached by another, by any RPC, and each keeps to its quotas."""

import asyncio
import base64
import hashlib
import http.client
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest
from typer.testing import CliRunner

from isthmus.cloud import server as server_module
from isthmus.cloud.commands.cloud import app
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.server import Server
from isthmus.cloud.store import audit, devices, students, tenants
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.students import StudentRow
from isthmus.cloud.store.tenants import Key, Quotas, Tenant
from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType, SignedManifest
from isthmus.proto.open_inference import inference_pb2 as oip
from isthmus.proto.open_inference import inference_pb2_grpc as oip_grpc
from isthmus.proto.v1 import elastic_pb2, elastic_pb2_grpc
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.service import Client, Rig
from tests.rigs.elastic.server import THREE, ElasticRig, pixels, png
from tests.rigs.generation.replicas import Script, scripted

NOT_FOUND, EXHAUSTED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@dataclass(frozen=True)
class Shared:
    """A server that tenants "a" and "b" share, for devices and for images. Their keys are "<name>-enrol" and so on."""

    rig: Rig
    server: Server
    channel: grpc.aio.Channel
    database: Database

    async def enrol(self, tenant: str) -> Client:
        return await self.rig.enrol(self.channel, key=f"{tenant}-enrol")

    def key(self, tenant: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {tenant}-query"),)

    @property
    def elastic(self) -> Any:
        return elastic_pb2_grpc.ElasticServiceStub(self.channel)

    @property
    def inference(self) -> Any:
        return oip_grpc.GRPCInferenceServiceStub(self.channel)


@asynccontextmanager
async def shared(
    folder: Path, release: Path, quotas: dict[str, Quotas] | None = None, **changes: Any
) -> AsyncIterator[Shared]:
    """Start the server with both tenants. ``quotas``: those of tenants that have some."""
    elastic = ElasticRig(folder)
    database = Database(f"sqlite:///{folder / 'state' / 'isthmus.db'}")
    (folder / "state").mkdir()
    database.migrate()
    for name in ("a", "b"):
        tenants.put(database, Tenant(name, 1.0, (quotas or {}).get(name, Quotas())))
        for purpose in ("enrol", "query"):
            digest = hashlib.sha256(f"{name}-{purpose}".encode()).digest()
            tenants.add_key(database, Key(digest, name, purpose, 1.0))
    async with elastic.running(release=release, workers=0, **changes) as (server, channel):
        yield Shared(Rig(release, folder / "state"), server, channel, database)
    database.close()


def frame(manifest: pb.StudentManifest) -> bytes:
    ones = np.ones(manifest.feature_width, np.float32)
    return pack_frame(FeatureFrame(Features(ones, ones), manifest.ratios[0], NumberType.FP32))


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


@pytest.mark.parametrize("how", ["revoke", "close"])
def test_a_device_is_out_in_mid_stream_when_it_is_revoked_or_its_tenant_is_closed(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(server_module, "_REVOKED_S", 0.01)

    async def scenario() -> tuple[float, list[tuple[grpc.StatusCode, str]]]:
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
            began_s = time.monotonic()
            if how == "revoke":
                assert devices.revoke(on.database, device.device_id, 2.0)
            else:
                tenants.put(on.database, Tenant("a", 1.0, closed_s=2.0))
            refusals = [await on.rig.refusal(streams[0].read())]
            took_s = time.monotonic() - began_s
            refusals += [await on.rig.refusal(device.describe())]
            if how == "close":
                query = elastic_pb2.ListTasksRequest()
                refusals.append(await on.rig.refusal(on.elastic.ListTasks(query, metadata=on.key("a"))))
            await streams[1].write(pb.InferRequest(sequence=2, frame=frame(manifest)))
            assert (await streams[1].read()).probabilities, "the other tenant's stream goes on"
            return took_s, refusals

    took_s, refusals = asyncio.run(scenario())
    assert {code for code, _ in refusals} == {UNAUTHENTICATED}
    assert took_s < 60


def test_the_audit_log_names_what_happened_and_forgets_what_is_erased(tiny_release: Path, tmp_path: Path) -> None:
    state = ["--state", str(tmp_path / "state")]

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, *state])
        assert done.exit_code == 0, done.output
        return done.stdout

    async def scenario() -> tuple[str, str]:
        async with shared(tmp_path, tiny_release, {"b": Quotas(most_devices=0)}) as on:
            first, second = await on.enrol("a"), await on.enrol("a")
            assert (await on.rig.refusal(on.enrol("b")))[0] is EXHAUSTED
            assert devices.revoke(on.database, first.device_id, time.time())
            await second.personalisation.Forget(pb.ForgetRequest(), metadata=second.metadata)
            await on.elastic.RegisterTask(THREE[0].messages(), metadata=on.key("a"))
            await on.elastic.RemoveTask(elastic_pb2.RemoveTaskRequest(name="ten"), metadata=on.key("a"))
            on.server.roster._told_s = float("-inf")
            await asyncio.to_thread(on.server.roster.refresh)
            entries = audit.listing(on.database)
            seen = [(each.tenant, each.action, each.subject) for each in entries if each.tenant in ("a", "b")]
            assert seen == [
                ("a", "enrolled", first.device_id),
                ("a", "enrolled", audit.ERASED),
                ("a", "revoked", first.device_id),
                ("a", "erased", audit.ERASED),
                ("a", "registered", "a/ten"),
                ("a", "removed", "a/ten"),
                ("b", "refused", "devices"),
            ]
            assert [each.action for each in entries if each.tenant == ""] == ["published"], "the base student"
            release = [each.action for each in entries if each.tenant == tenants.DEFAULT]
            assert release == ["published release", "offered release"]
            return await asyncio.to_thread(run, "audit"), second.device_id

    shown, erased = asyncio.run(scenario())
    assert erased not in shown and "a/ten" in shown
    assert run("audit", "--tenant", "b").count("refused") == 1


def test_tenants_are_made_changed_and_closed_by_the_command(tiny_release: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shared(tmp_path, tiny_release):
            pass

    asyncio.run(scenario())
    state, key = ["--state", str(tmp_path / "state")], tmp_path / "acme.key"

    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["tenants", *state, *words])
        assert done.exit_code == code, done.output
        assert code == 0 or done.stderr.strip().count("\n") == 0
        return done.stdout

    run("--add", "acme", "--devices", "5", "--queries-per-s", "0.5")
    run("--add", "acme", code=1)
    run("--add", "ACME/x", code=1)
    run("--change", "acme", "--devices", "none", "--bytes-per-day", "0")
    run("--change", "acme", "--devices", "-1", code=1)
    run("--change", "nobody", "--devices", "1", code=1)
    run("--new-key", "acme", "--key-file", str(key))
    run("--new-key", "acme", "--key-file", str(key), code=1)
    run("--new-key", "default", "--key-file", str(tmp_path / "other"), code=1)
    assert (key.stat().st_mode & 0o777, len(key.read_text().strip()) >= 43) == (0o600, True)
    run("--close", "acme")
    line = next(line for line in run().splitlines() if line.startswith("acme"))
    assert line.split("\t") == ["acme", "closed", "1", "none", "none", "none", "0.5", "0", "0", "0"]
    database = Database(f"sqlite:///{tmp_path / 'state' / 'isthmus.db'}")
    assert key.read_text().strip().encode() not in (tmp_path / "state" / "isthmus.db").read_bytes()
    actions = [entry.action for entry in audit.listing(database, tenant="acme")]
    assert actions == ["added", "changed", "made key", "closed"]
    database.close()


def test_http_serves_each_tenant_its_own_and_counts_to_its_quotas(tiny_release: Path, tmp_path: Path) -> None:
    def call(port: int, path: str, key: str, body: bytes | None = None) -> tuple[int, Any, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            connection.request("GET" if body is None else "POST", path, body, headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read() or b"{}"), reply.getheader("retry-after", "")
        finally:
            connection.close()

    def image(count: int) -> bytes:
        data = [base64.b64encode(png(pixels(number))).decode() for number in range(count)]
        given = {"name": "image", "datatype": "BYTES", "shape": [count, 1], "data": data}
        return json.dumps({"inputs": [{**given, "parameters": {"content_type": "base64"}}]}).encode()

    async def scenario() -> None:
        quotas = {"a": Quotas(queries_per_s=4.0), "b": Quotas(bytes_per_day=2_000)}
        async with shared(tmp_path, tiny_release, quotas, http="127.0.0.1:0") as on:
            await on.elastic.RegisterTask(THREE[0].messages(), metadata=on.key("a"))
            port, roster, task = on.server.http_port, on.server.roster, THREE[0].spec.name
            assert port is not None

            async def ask(path: str, key: str, body: bytes | None = None) -> tuple[int, Any, str]:
                roster._buckets.clear()
                return await asyncio.to_thread(call, port, path, key, body)

            infer = f"/v2/models/{task}/infer"
            assert (await ask(f"/v2/models/{task}", "a-query"))[0] == 200
            assert (await ask(f"/v2/models/{task}", "b-query"))[0] == 404, "it is another tenant's"
            assert (await ask(f"/v2/models/{task}", ""))[0] == 404, "without a key it is asked of the tenant default"
            assert [(await ask(f"/v2/models/{task}", key))[0] for key in ("a-enrol", "nobody's")] == [401] * 2
            before = roster.counted()[0]["a"]
            assert (await ask(infer, "a-query", image(3)))[0] == 200
            assert roster.counted()[0]["a"] == before + 3, "each image counts"
            status, said, retry = await ask(infer, "a-query", image(9))
            assert status == 429 and "quota of queries per second is used up" in said["error"] and retry
            status, said, _ = await ask(infer, "b-query", b"x" * 4_000)
            assert status == 429 and "quota of bytes per day is used up" in said["error"]
            assert {("a", "queries"), ("b", "bytes")} <= roster.counted()[1].keys()
            tenants.put(on.database, Tenant("a", 1.0, closed_s=2.0))
            await asyncio.to_thread(roster.refresh)
            assert (await ask(infer, "a-query", image(1)))[0] == 401, "it was closed"

    asyncio.run(scenario())


@pytest.mark.parametrize("shared_class", [True, False])
def test_no_tenant_finds_what_was_kept_or_computed_for_another(
    shared_class: bool, tiny_release: Path, tmp_path: Path
) -> None:
    (tmp_path / "rules.json").write_text(json.dumps({"faq": {"shared": shared_class}}))
    asked = {
        "model": "words",
        "prompt": "what is it?",
        "max_tokens": 5,
        "temperature": 0,
        "kind": "faq",
        "user": "ada",
        "cache_salt": "",
    }

    def call(port: int, key: str, **changes: Any) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            connection.request("POST", "/v1/completions", json.dumps({**asked, **changes}), headers)
            return str(json.loads(connection.getresponse().read())["isthmus"]["outcome"])
        finally:
            connection.close()

    def infer() -> oip.ModelInferRequest:
        tensor = oip.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"what is it?")
        request = oip.ModelInferRequest(model_name="words", inputs=[tensor])
        for name in ("kind", "user"):
            request.parameters[name].string_param = str(asked[name])
        request.parameters["max_tokens"].int64_param = 5
        request.parameters["temperature"].double_param = 0.0
        return request

    async def scenario(url: str) -> None:
        generate = GenerationSettings(upstream=[url], name="words", cache=tmp_path / "rules.json")
        async with shared(tmp_path, tiny_release, http="127.0.0.1:0", generate=generate) as on:
            port = on.server.http_port
            assert port is not None
            for key in ("a-query", "b-query", ""):
                assert await asyncio.to_thread(call, port, key) == "finished"
                assert await asyncio.to_thread(call, port, key) == "cached"
            for tenant in ("a", "b"):
                found = await on.inference.ModelInfer(infer(), metadata=on.key(tenant))
                assert found.parameters["outcome"].string_param == "cached", "its own, over both protocols"
            salts = [each.get("cache_salt") for each in script.seen]
            assert len({*salts}) == 3 and salts[2] is None, "without tenants, other servers get no field of ours"
            # Who knows another tenant's salt is no nearer to what was computed for it.
            for key in ("b-query", ""):
                await asyncio.to_thread(call, port, key, kind="", cache_salt=salts[0])
                assert script.seen[-1]["cache_salt"] not in salts

    script = Script(pieces=["it."])
    with scripted(script) as url:
        asyncio.run(scenario(url))
