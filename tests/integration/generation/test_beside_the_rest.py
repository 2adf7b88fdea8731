"""``isthmus cloud serve`` in front of other servers, with a cache: the official openai client, gRPC and the metrics."""

import asyncio
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from isthmus.cloud.generation.serve.carrier import Lost
from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.generation.serve.upstream import Upstream
from isthmus.cloud.metrics.generation import GenerationCollector
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.proto.open_inference import inference_pb2 as pb
from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc
from tests.rigs.generation.llama import save_tiny_llama, serving_http
from tests.rigs.generation.replicas import Script, scripted
from tests.rigs.project.patience import HANGS_S

MESSAGES: Any = [{"role": "user", "content": "Come back!"}]
GREEDY: Any = {"model": "words", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("replica") / "tiny"
    save_tiny_llama(folder)
    with serving_http(open_generation(GenerationSettings(folder, max_tokens=200, rows=4, kv_tokens=2_048))) as url:
        yield url


async def served(tmp_path: Path, generate: GenerationSettings, ask: Any) -> None:
    server = Server(CloudSettings(state=tmp_path / "state", http="127.0.0.1:0", generate=generate))
    port = await server.start()
    try:
        url = f"http://127.0.0.1:{server.http_port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=HANGS_S) as client:
            await ask(server, client, f"127.0.0.1:{port}")
    finally:
        await server.stop()


def test_upstream_servers_answer_through_the_service(replica: str, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=f"{replica}/v1", api_key="none") as direct:
        whole = direct.chat.completions.create(**{**GREEDY, "model": "tiny"}).choices[0].message.content
        text = direct.completions.create(model="tiny", prompt="come", max_tokens=3, seed=1).choices[0].text
    assert whole

    async def ask(server: Server, client: openai.AsyncOpenAI, address: str) -> None:
        done = await client.chat.completions.create(**GREEDY)
        assert done.choices[0].message.content == whole and done.model == "words"
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(**GREEDY, stream=True)
        ]
        assert "".join(pieces) == whole and len(pieces) > 3
        async with grpc.aio.insecure_channel(address) as channel:
            tensor = pb.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(b"come")
            request = pb.ModelInferRequest(model_name="words", inputs=[tensor])
            request.parameters["max_tokens"].int64_param = 3
            request.parameters["seed"].int64_param = 1
            answer = await pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        (raw,) = answer.raw_output_contents
        assert struct.unpack("<I", raw[:4])[0] == len(raw) - 4 and raw[4:].decode() == text
        assert server.generation is not None
        registry = CollectorRegistry()
        registry.register(GenerationCollector(server.generation.answering))
        page = generate_latest(registry).decode()
        assert 'isthmus_generate_requests_total{outcome="finished"} 3.0' in page
        assert "isthmus_generate_first_token_seconds_count 3.0" in page

    # The second replica is down; the first one answers.
    settings = GenerationSettings(upstream=[replica, "http://127.0.0.1:9"], name="words", max_tokens=200)
    asyncio.run(served(tmp_path, settings, ask))


def test_replicas_of_the_servers_own_answer_beside_the_rest(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")

    async def ask(server: Server, client: openai.AsyncOpenAI, address: str) -> None:
        done = await client.chat.completions.create(**GREEDY)
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(**GREEDY, stream=True)
        ]
        assert "".join(pieces) == done.choices[0].message.content and done.usage is not None
        assert server.generation is not None
        relay: Any = server.generation.answering
        assert done.usage.prompt_tokens == await relay._counts.of_chat(MESSAGES)
        with pytest.raises(openai.BadRequestError, match="colour: this field is not supported"):
            await client.chat.completions.create(**GREEDY, extra_body={"colour": "red"})
        with pytest.raises(openai.BadRequestError, match="that the model can hold"):
            await client.completions.create(model="words", prompt="word " * 300, max_tokens=4)

    settings = GenerationSettings(tmp_path / "tiny", replicas=2, executor="process", name="words", max_tokens=200)
    asyncio.run(served(tmp_path, settings, ask))


@pytest.mark.parametrize(
    ("images", "replies"), [("ray", "ray"), ("ray", "ray://head:10001"), ("ray://head:10001", "ray://other:10001")]
)
def test_a_server_is_on_one_ray_cluster(images: str, replies: str, tmp_path: Path) -> None:
    generate = GenerationSettings(tmp_path / "tiny", executor=replies)
    with pytest.raises(ValueError, match="a server is on one Ray cluster: start one with 'ray start --head'"):
        CloudSettings(state=tmp_path, elastic_model="vit", executor=images, generate=generate)
    same = GenerationSettings(tmp_path / "tiny", executor="ray://head:10001")
    CloudSettings(state=tmp_path, elastic_model="vit", executor="ray://head:10001", generate=same)


def test_answers_are_kept_and_a_drained_server_gets_nothing(tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text('{"faq": {"shared": true}}')
    first, second = Script(pieces=["first."]), Script(pieces=["second."])

    async def ask(server: Server, client: openai.AsyncOpenAI, address: str) -> None:
        kept = {**GREEDY, "extra_body": {"kind": "faq"}}
        answers = [await client.chat.completions.create(**kept) for _ in range(2)]
        assert [answer.choices[0].message.content for answer in answers] == ["first."] * 2
        outcomes: list[Any] = [answer.model_extra for answer in answers]
        assert [each["isthmus"]["outcome"] for each in outcomes] == ["finished", "cached"]
        (tmp_path / "drained").write_text(urls[0])
        assert server.generation is not None
        server.generation.read_drained()
        assert (await client.chat.completions.create(**GREEDY)).choices[0].message.content == "second."

    with scripted(first) as one, scripted(second) as two:
        urls = [one, two]
        (tmp_path / "drained").write_text("")
        settings = GenerationSettings(
            upstream=urls,
            name="words",
            policy="vtc",
            cache=tmp_path / "rules.json",
            drained=tmp_path / "drained",
            max_tokens=200,
        )
        asyncio.run(served(tmp_path, settings, ask))
    assert (len(first.seen), len(second.seen)) == (1, 1)


def test_the_cloud_moves_requests_of_its_model_for_who_has_the_key_for_moves(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")
    (tmp_path / "move-key").write_text("sesame")

    async def ask(server: Server, client: openai.AsyncOpenAI, address: str) -> None:
        url = f"http://127.0.0.1:{server.http_port}"
        upstream, stranger = Upstream(url, move_key="sesame"), Upstream(url, move_key="guessed")
        try:
            assert (await upstream.costs())["takes_blocks"]
            with pytest.raises(Lost, match="status 401"):
                await stranger.costs()
        finally:
            await upstream.close()
            await stranger.close()

    settings = GenerationSettings(tmp_path / "tiny", max_tokens=200, move_key_file=tmp_path / "move-key")
    asyncio.run(served(tmp_path, settings, ask))
