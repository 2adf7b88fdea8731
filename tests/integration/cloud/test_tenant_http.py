"""Tenants over HTTP: each has its own tasks, quotas, kept answers and computed prompts."""

import asyncio
import base64
import http.client
import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.store import tenants
from isthmus.cloud.store.tenants import Quotas, Tenant
from isthmus.proto.open_inference import inference_pb2 as oip
from tests.rigs.cloud.tenants import shared
from tests.rigs.elastic.server import THREE, pixels, png
from tests.rigs.generation.replicas import Script, scripted
from tests.rigs.project.patience import HANGS_S


def test_http_serves_each_tenant_its_own_and_counts_to_its_quotas(tiny_release: Path, tmp_path: Path) -> None:
    def call(port: int, path: str, key: str, body: bytes | None = None) -> tuple[int, Any, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS_S)
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
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS_S)
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
