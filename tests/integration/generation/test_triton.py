"""Triton's own client, unchanged, and OpenAI's, against one service with image tasks and a language model."""

import queue
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest

from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.settings import CloudSettings
from isthmus.proto.open_inference import inference_pb2 as pb
from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import THREE, ElasticRig, pixels
from tests.rigs.generation.llama import save_tiny_llama
from tests.rigs.project.patience import HANGS_S
from tests.rigs.project.protobuf import TOO_NEW_FOR_TRITON, WHY

if TOO_NEW_FOR_TRITON:
    pytest.skip(WHY, allow_module_level=True)

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> ElasticRig:
    rig = ElasticRig(tmp_path_factory.mktemp("both"))
    save_tiny_llama(rig.folder / "tiny")
    return rig


@pytest.fixture(scope="module")
def address(rig: ElasticRig) -> Iterator[str]:
    with rig.serving(*THREE, generate=GenerationSettings(rig.folder / "tiny", rows=4, kv_tokens=1_024)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address) as client:
        yield client


def text(said: str) -> list[Any]:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([said.encode()], dtype=np.object_))
    return [tensor]


def stream(client: Any, asked: list[tuple[str, str, dict[str, Any]]]) -> dict[str, list[Any]]:
    """Streams all requests (id, text, parameters), and returns each one's responses up to its final one."""
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: came.put((result, error)))
    found: dict[str, list[Any]] = {id: [] for id, _, _ in asked}
    for id, said, parameters in asked:
        client.async_stream_infer("tiny", text(said), request_id=id, parameters=parameters)
    final = 0
    while final < len(asked):
        result, error = came.get(timeout=HANGS_S)
        assert error is None, error
        response = result.get_response()
        found[response.id].append(result)
        final += response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    return found


def said_by(results: list[Any]) -> str:
    return "".join(result.as_numpy("text_output")[0].decode() for result in results)


def test_the_model_is_listed_beside_the_tasks(client: Any) -> None:
    assert client.is_server_ready() and client.is_model_ready("tiny") and client.is_model_ready("ten")
    assert not client.is_model_ready("large")
    assert {model.name for model in client.get_model_repository_index().models} == {"tiny", "ten", "pair", "five"}
    metadata = client.get_model_metadata("tiny")
    assert (metadata.inputs[0].name, metadata.outputs[0].datatype) == ("text_input", "BYTES")
    assert client.get_model_config("tiny").config.parameters["context_tokens"].string_value == "256"
    assert client.get_model_metadata("ten").inputs[0].name == "image"
    assert {stats.name for stats in client.get_inference_statistics().model_stats} >= {"tiny", "ten"}


def test_streams_bring_several_responses_and_mark_the_last(client: Any) -> None:
    parameters = {"max_tokens": 14, "seed": 5, "temperature": "0.8"}
    found = stream(client, [(str(at), f"{at}: come back", parameters) for at in range(3)])
    for at in range(3):
        results = found[str(at)]
        whole = client.infer("tiny", text(f"{at}: come back"), parameters=parameters)
        assert said_by(results) == whole.as_numpy("text_output")[0].decode()
        assert len(results) > 3
        last = results[-1].get_response().parameters
        assert 1 <= last["tokens"].int64_param <= 14
        assert last["finish_reason"].string_param in ("stop", "length")
        assert last["total_us"].int64_param >= last["ttft_us"].int64_param > 0
        assert not any(each.get_response().parameters["triton_final_response"].bool_param for each in results[:-1])


def test_image_tasks_are_answered_in_the_same_stream(client: Any) -> None:
    tensor = triton.InferInput("pixels", (1, 16, 16, 3), "UINT8")
    tensor.set_data_from_numpy(pixels(1)[None])
    assert client.infer("ten", [tensor]).as_numpy("logits").shape == (1, 10)
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: came.put((result, error)))
    client.async_stream_infer("ten", [tensor], request_id="image")
    result, error = came.get(timeout=HANGS_S)
    client.stop_stream()
    assert error is None and result.as_numpy("label").shape == (1,)


@pytest.mark.parametrize(
    ("said", "parameters", "message"),
    [
        ("", {}, "prompt: it is empty"),
        ("x", {"colour": 1}, "unknown parameter 'colour'"),
        ("x", {"max_tokens": 0}, "max_tokens: must be from 1"),
        ("x", {"max_tokens": "1.5"}, "must be a whole number"),
        ("x", {"temperature": "hot"}, "must be a number"),
        ("x", {"stop": "y" * 65}, "64 bytes"),
        ("word " * 300, {}, "that the model can hold"),
    ],
)
def test_what_is_not_served_is_refused(client: Any, said: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message):
        client.infer("tiny", text(said), parameters=parameters)


def test_tensors_that_are_no_text_are_refused(address: str) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for inputs, raw in (
            ([], []),
            ([tensor(name="text_input", datatype="BYTES", shape=[2])], [b""]),
            ([tensor(name="text_input", datatype="FP32", shape=[1])], [b""]),
            ([tensor(name="text_input", datatype="BYTES", shape=[1])], [struct.pack("<I", 1 << 31) + b"x"]),
            ([tensor(name="text_input", datatype="BYTES", shape=[1])], [struct.pack("<I", 1) + b"\xff"]),
            ([tensor(name="text_input", datatype="BYTES", shape=[1])], []),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(pb.ModelInferRequest(model_name="tiny", inputs=inputs, raw_input_contents=raw))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_both_fronts_ask_one_model_with_one_key(rig: ElasticRig, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame")
    changes = {"elastic_model": None, "elastic_profile": None, "elastic_pixels": None, "state": tmp_path / "state"}

    def settings(**further: object) -> CloudSettings:
        return rig.settings(**{"generate": GenerationSettings(rig.folder / "tiny"), **changes, **further})

    with pytest.raises(ValueError, match="--http is for models"):
        rig.settings(**changes, release=tmp_path, http="127.0.0.1:0")
    with pytest.raises(
        ValueError, match=r"0\.0\.0\.0 can be reached .* --tls-cert and --tls-key and --generate-key-file"
    ):
        settings(http="0.0.0.0:8000")
    with pytest.raises(ValueError, match="or neither"):
        rig.settings(generate=GenerationSettings(rig.folder / "tiny", key_file=key))

    import asyncio

    from isthmus.cloud.server import Server

    async def ask() -> None:
        server = Server(settings(http="127.0.0.1:0", generate=GenerationSettings(rig.folder / "tiny", key_file=key)))
        port = await server.start()
        try:
            async with openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{server.http_port}/v1", api_key="sesame", max_retries=0
            ) as client:
                done = await client.completions.create(model="tiny", prompt="come", max_tokens=3, seed=1)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                tensor = pb.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
                tensor.contents.bytes_contents.append(b"come")
                request = pb.ModelInferRequest(model_name="tiny", inputs=[tensor])
                request.parameters["max_tokens"].int64_param = 3
                request.parameters["seed"].int64_param = 1
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.ModelInfer(request)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
                answer = await stub.ModelInfer(request, metadata=(("authorization", "Bearer sesame"),))
            assert answer.raw_output_contents[0][4:].decode() == done.choices[0].text
        finally:
            await server.stop()

    asyncio.run(ask())


def test_a_message_that_cannot_be_decoded_ends_the_stream(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        good = pb.ModelInferRequest(model_name="tiny", id="good").SerializeToString()
        responses = call(iter([good, b"\xff\xff"]), timeout=HANGS_S)
        with pytest.raises(grpc.RpcError) as refused:
            list(responses)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
