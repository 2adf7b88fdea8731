"""A server of elastic serving that stops tells its streams at once, and still answers what they have asked."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.cloud import server as cloud_server
from isthmus.cloud.elastic.model.executor import Item
from isthmus.cloud.elastic.tasks.task import FloatArray
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.http import server as http_server
from isthmus.cloud.server import Server
from isthmus.proto.open_inference import inference_pb2 as pb
from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import SIDE, THREE, ElasticRig, pixels, refusal
from tests.rigs.generation.llama import save_tiny_llama

LONG_S = 600.0
"""A grace that no test waits for."""
STOPS = (grpc.StatusCode.UNAVAILABLE, "this server stops; connect again")


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ElasticRig:
    monkeypatch.setattr(cloud_server, "_GRACE_S", LONG_S)
    monkeypatch.setattr(http_server, "_GRACE_S", LONG_S)
    return ElasticRig(tmp_path)


def request(seed: int) -> pb.ModelInferRequest:
    found = pb.ModelInferRequest(model_name=THREE[0].spec.name, id=str(seed))
    found.inputs.add(name="pixels", datatype="UINT8", shape=[1, SIDE, SIDE, 3])
    found.raw_input_contents.append(pixels(seed).tobytes())
    found.parameters["latency_s"].double_param = LONG_S
    return found


@contextmanager
def held(server: Server) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Holds the server's batches. Yields (set once one has begun, what lets them go)."""
    assert server.elastic is not None
    (executor,) = server.elastic.live._crew.all
    begun, free = threading.Event(), threading.Event()
    run = executor.run

    def holding(items: Sequence[Item], gamma: int) -> list[FloatArray]:
        begun.set()
        assert free.wait(LONG_S)
        return run(items, gamma)

    executor.run = holding  # type: ignore[method-assign]
    try:
        yield begun, free
    finally:
        free.set()


@pytest.mark.parametrize("with_text", [False, True], ids=["image tasks", "with a language model"])
def test_a_stream_of_queries_gets_its_answers_and_then_hears_why_it_ends(rig: ElasticRig, with_text: bool) -> None:
    changes: dict[str, Any] = {}
    if with_text:
        save_tiny_llama(rig.folder / "tiny")
        changes["generate"] = GenerationSettings(rig.folder / "tiny", rows=4, kv_tokens=1_024)

    async def scenario() -> tuple[list[str], tuple[grpc.StatusCode, str], tuple[grpc.StatusCode, str]]:
        async with rig.running(*THREE, **changes) as (server, channel):
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            asking, idle = stub.ModelStreamInfer(), stub.ModelStreamInfer()
            await idle.write(request(0))
            assert (await idle.read()).infer_response.id == "0"
            with held(server) as (begun, free):
                for seed in (1, 2, 3):
                    await asking.write(request(seed))
                assert await asyncio.to_thread(begun.wait, LONG_S)
                assert server.elastic is not None
                while sum(server.elastic.live.snapshot().pending.values()) < 3:
                    await asyncio.sleep(0.001)
                stopping = asyncio.create_task(server.stop())
                told = await refusal(idle.read())
                assert not stopping.done()
                free.set()
                answers = [await asking.read() for _ in range(3)]
                assert not any(answer.error_message for answer in answers)
                at_its_end = await refusal(asking.read())
            await stopping
            return [answer.infer_response.id for answer in answers], told, at_its_end

    answered, told, at_its_end = asyncio.run(scenario())
    assert sorted(answered) == ["1", "2", "3"]
    assert (told, at_its_end) == (STOPS, STOPS)


def test_streams_of_grpc_are_told_while_a_call_over_http_still_ends(rig: ElasticRig) -> None:
    async def scenario() -> None:
        async with rig.running(*THREE, http="127.0.0.1:0") as (server, channel):
            stream = pb_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
            await stream.write(request(0))
            assert (await stream.read()).infer_response.id == "0"
            reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
            head = "POST /v2/models/ten/infer HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: 10\r\nExpect: 100-continue\r\n\r\n".encode())
            assert b"100 Continue" in await reader.readuntil(b"\r\n"), "the call has begun"
            stopping = asyncio.create_task(server.stop())
            assert await refusal(stream.read()) == STOPS
            assert not stopping.done() and not reader.at_eof(), "HTTP waits for the call that has begun"
            writer.close()
            await stopping

    asyncio.run(scenario())
