"""Triton's own client, unchanged, against the service: every call it has for a server of classifiers."""

import queue
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from isthmus.proto.limits import MAX_IMAGES_PER_REQUEST
from isthmus.proto.open_inference import inference_pb2 as pb
from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import GAMMAS, PIXELS, SIDE, THREE, ElasticRig, Made, huge_png, pixels, png
from tests.rigs.project.patience import HANGS_S
from tests.rigs.project.protobuf import TOO_NEW_FOR_TRITON, WHY

if TOO_NEW_FOR_TRITON:
    pytest.skip(WHY, allow_module_level=True)

import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

TEN, PAIR, FIVE = THREE
MANY = 1_000


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> ElasticRig:
    return ElasticRig(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def address(rig: ElasticRig) -> Iterator[str]:
    with rig.serving(*THREE, elastic_max_waiting=2 * MANY, max_calls=2 * MANY) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address) as client:
        yield client


def encoded(*seeds: int) -> list[Any]:
    files = np.array([png(pixels(seed)) for seed in seeds], dtype=np.object_)
    tensor = triton.InferInput("image", [len(seeds)], "BYTES")
    tensor.set_data_from_numpy(files)
    return [tensor]


def bare(*seeds: int) -> list[Any]:
    values = np.stack([pixels(seed) for seed in seeds])
    tensor = triton.InferInput("pixels", values.shape, "UINT8")
    tensor.set_data_from_numpy(values)
    return [tensor]


def standardised(*seeds: int) -> list[Any]:
    values = PIXELS.standardise(np.stack([pixels(seed) for seed in seeds]))
    tensor = triton.InferInput("tensor", values.shape, "FP32")
    tensor.set_data_from_numpy(values)
    return [tensor]


def gamma_of(result: Any) -> int:
    return int(result.get_response().parameters["gamma"].int64_param)


def assert_right(rig: ElasticRig, made: Made, seed: int, result: Any) -> None:
    """Assert that the answer equals a direct call of the model, and that its class has the highest logit."""
    logits_NC = result.as_numpy("logits")
    assert logits_NC.shape == (1, len(made.spec.classes))
    np.testing.assert_allclose(logits_NC[0], rig.direct(made, pixels(seed), gamma_of(result)), atol=1e-4)
    assert result.as_numpy("label").tolist() == [made.spec.classes[int(logits_NC.argmax())].encode()]


def test_what_a_client_asks_before_it_sends_anything(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ten")
    assert client.is_model_ready("ten", "1")
    assert not client.is_model_ready("ten", "2")
    assert not client.is_model_ready("nobody")
    metadata = client.get_server_metadata(as_json=True)
    assert metadata["name"] == "isthmus"
    model = client.get_model_metadata("pair", as_json=True)
    assert [(each["name"], each["datatype"], each["shape"]) for each in model["inputs"]] == [
        ("image", "BYTES", ["-1"]),
        ("pixels", "UINT8", ["-1", "16", "16", "3"]),
        ("tensor", "FP32", ["-1", "3", "16", "16"]),
    ]
    assert [(each["name"], each["shape"]) for each in model["outputs"]] == [("logits", ["-1", "2"]), ("label", ["-1"])]
    config = client.get_model_config("pair", as_json=True)["config"]
    assert config["max_batch_size"] == MAX_IMAGES_PER_REQUEST
    assert [(each["name"], each["data_type"]) for each in config["input"]] == [
        ("image", "TYPE_STRING"),
        ("pixels", "TYPE_UINT8"),
        ("tensor", "TYPE_FP32"),
    ]
    assert config["parameters"]["gammas"]["string_value"] == ",".join(map(str, GAMMAS))
    index = client.get_model_repository_index(as_json=True)["models"]
    assert [(each["name"], each["state"]) for each in index] == [("five", "READY"), ("pair", "READY"), ("ten", "READY")]


@pytest.mark.parametrize("made", THREE, ids=lambda made: made.spec.name)
@pytest.mark.parametrize("inputs", [encoded, bare, standardised])
def test_images_in_every_form_are_answered_as_the_model_answers(
    rig: ElasticRig, client: Any, made: Made, inputs: Any
) -> None:
    result = client.infer(made.spec.name, inputs(5), request_id="mine", parameters={"latency_s": 30.0, "utility": 1})
    assert_right(rig, made, 5, result)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("mine", made.spec.name, "1")
    told = response.parameters
    assert told["in_time"].bool_param
    assert 0 <= told["queue_s"].double_param < 30
    assert 0 < told["run_s"].double_param < 30


def test_several_images_in_one_request_are_answered_in_their_order(rig: ElasticRig, client: Any) -> None:
    result = client.infer("ten", bare(*range(20)), timeout=120_000_000)
    logits_NC = result.as_numpy("logits")
    told = result.get_response().parameters
    gammas = [gamma_of(result)] * 20 if "gamma" in told else list(map(int, told["gammas"].string_param.split(",")))
    for seed, (logits_C, gamma) in enumerate(zip(logits_NC, gammas, strict=True)):
        np.testing.assert_allclose(logits_C, rig.direct(TEN, pixels(seed), gamma), atol=1e-4)


def test_only_the_outputs_asked_for_are_sent_and_classes_are_ranked(client: Any) -> None:
    result = client.infer("ten", bare(1), outputs=[triton.InferRequestedOutput("label")])
    assert result.as_numpy("logits") is None
    (label,) = result.as_numpy("label").tolist()
    ranked = client.infer("ten", bare(1), outputs=[triton.InferRequestedOutput("logits", class_count=3)])
    lines = [line.decode().split(":") for line in ranked.as_numpy("logits")[0].tolist()]
    assert len(lines) == 3
    assert [float(logit) for logit, _, _ in lines] == sorted((float(logit) for logit, _, _ in lines), reverse=True)
    assert lines[0][2] == label.decode() == f"ten-{lines[0][1]}"


def test_a_thousand_at_once_over_three_tasks(rig: ElasticRig, client: Any) -> None:
    """The client's asynchronous call: each is answered once, with its own image's answer under its own task."""
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    inputs = [bare(seed) for seed in range(20)]
    for number in range(MANY):
        made = THREE[number % 3]

        def done(result: Any, error: Any, number: int = number) -> None:
            answers.put((number, result, error))

        client.async_infer(made.spec.name, inputs[number % 20], done, parameters={"latency_s": 120.0})
    found = [answers.get(timeout=300) for _ in range(MANY)]
    assert sorted(number for number, _, _ in found) == list(range(MANY))
    assert [error for _, _, error in found if error is not None] == []
    for number, result, _ in found:
        assert_right(rig, THREE[number % 3], number % 20, result)
    assert answers.empty()


def test_clients_that_block_on_many_threads(rig: ElasticRig, client: Any) -> None:
    def ask(number: int) -> Any:
        return client.infer(THREE[number % 3].spec.name, encoded(number % 7), client_timeout=300)

    with ThreadPoolExecutor(16) as pool:
        for number, result in enumerate(pool.map(ask, range(100))):
            assert_right(rig, THREE[number % 3], number % 7, result)


def test_the_asyncio_client(rig: ElasticRig, address: str) -> None:
    import asyncio

    async def scenario() -> tuple[list[Any], list[Any]]:
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            calls = [client.infer(THREE[number % 3].spec.name, bare(number % 7)) for number in range(60)]
            answers = await asyncio.gather(*calls)

            async def requests() -> Any:
                for number in range(60):
                    yield {"model_name": THREE[number % 3].spec.name, "inputs": bare(number % 7)}

            streamed = [reply async for reply in client.stream_infer(requests())]
            return answers, streamed

    answers, streamed = asyncio.run(scenario())
    for number, result in enumerate(answers):
        assert_right(rig, THREE[number % 3], number % 7, result)
    assert len(streamed) == 60
    for number, (result, error) in enumerate(streamed):
        assert error is None
        assert_right(rig, THREE[number % 3], number % 7, result)


def test_a_stream_goes_on_after_a_refusal_and_keeps_the_order(rig: ElasticRig, client: Any) -> None:
    replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: replies.put((result, error)))
    for number in range(300):
        name = "nobody" if number % 10 == 9 else THREE[number % 3].spec.name
        client.async_stream_infer(name, bare(number % 7), request_id=str(number), parameters={"latency_s": 60.0})
    found = [replies.get(timeout=300) for _ in range(300)]
    client.stop_stream()
    assert replies.empty()
    for number, (result, error) in enumerate(found):
        if number % 10 == 9:
            assert "no task 'nobody'" in str(error)
        else:
            assert error is None
            assert result.get_response().id == str(number)
            assert_right(rig, THREE[number % 3], number % 7, result)


def test_a_stream_that_its_client_cancels_disturbs_nobody(rig: ElasticRig, client: Any) -> None:
    ended = threading.Event()
    client.start_stream(lambda result, error: ended.set() if error is not None else None)
    for number in range(200):
        client.async_stream_infer("ten", bare(number % 7))
    client.stop_stream(cancel_requests=True)
    assert ended.wait(HANGS_S)
    assert_right(rig, TEN, 3, client.infer("ten", bare(3)))


def test_statistics_count_what_was_answered(client: Any) -> None:
    def counted() -> tuple[int, int, int]:
        (stats,) = client.get_inference_statistics("five").model_stats
        return stats.inference_count, stats.inference_stats.success.count, stats.inference_stats.compute_infer.ns

    before = counted()
    for seed in range(4):
        client.infer("five", bare(seed))
    after = counted()
    assert (after[0] - before[0], after[1] - before[1]) == (4, 4)
    assert after[2] > before[2]
    assert len(client.get_inference_statistics().model_stats) == 3


def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()), str(caught.value.message())


def tensor(name: str, shape: list[int], datatype: str, values: np.ndarray) -> list[Any]:
    made = triton.InferInput(name, shape, datatype)
    made.set_data_from_numpy(values)
    return [made]


def one_file(data: bytes) -> list[Any]:
    return tensor("image", [1], "BYTES", np.array([data], dtype=np.object_))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda: [*bare(0), *standardised(0)], "exactly one of"),
        (lambda: tensor("picture", [1], "UINT8", np.zeros(1, np.uint8)), "exactly one of"),
        (
            lambda: tensor("pixels", [1, 8, 8, 3], "UINT8", np.zeros((1, 8, 8, 3), np.uint8)),
            "16, 16, 3) is required",
        ),
        (lambda: tensor("pixels", [SIDE, SIDE, 3], "UINT8", np.zeros((SIDE, SIDE, 3), np.uint8)), "is required"),
        (lambda: tensor("tensor", [1, 3, SIDE, SIDE], "FP64", np.zeros((1, 3, SIDE, SIDE))), "this is FP64"),
        (lambda: tensor("pixels", [0, SIDE, SIDE, 3], "UINT8", np.zeros((0, SIDE, SIDE, 3), np.uint8)), "is required"),
        (lambda: tensor("tensor", [1, 3, SIDE, SIDE], "FP32", np.full((1, 3, SIDE, SIDE), np.nan, np.float32)), "NaN"),
        (lambda: one_file(b""), "neither a JPEG nor a PNG"),
        (lambda: one_file(b"\xff\xd8\xff\xe0 broken"), "image:"),
        (lambda: one_file(png(pixels(0))[:-40]), "broken or truncated"),
        (lambda: one_file(huge_png()), "not decoded"),
    ],
)
def test_inputs_that_are_no_image_are_refused(client: Any, inputs: Any, message: str) -> None:
    status, text = refused(lambda: client.infer("ten", inputs()))
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": {"latency_s": -1.0}}, "latency must be"),
        ({"parameters": {"latency_s": 1e12}}, "latency must be"),
        ({"parameters": {"latency_s": float("nan")}}, "latency must be"),
        ({"parameters": {"latency_s": "soon"}}, "must be a number"),
        ({"parameters": {"latency_s": True}}, "must be a number"),
        ({"parameters": {"utility": float("nan")}}, "utility must be"),
        ({"parameters": {"utility": -3}}, "utility must be"),
        ({"parameters": {"utilty": 1.0}}, "unknown parameter 'utilty'"),
        ({"timeout": -1}, "latency must be"),
        ({"outputs": [triton.InferRequestedOutput("scores")]}, "not 'scores'"),
        ({"outputs": [triton.InferRequestedOutput("label", class_count=2)]}, "classification"),
    ],
)
def test_terms_that_cannot_be_are_refused(client: Any, options: dict[str, Any], message: str) -> None:
    status, text = refused(lambda: client.infer("ten", bare(0), **options))
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message in text


def test_other_refusals_say_what_they_are(client: Any) -> None:
    assert refused(lambda: client.infer("nobody", bare(0)))[0] == "StatusCode.NOT_FOUND"
    assert refused(lambda: client.infer("ten", bare(0), model_version="9"))[0] == "StatusCode.NOT_FOUND"
    assert refused(lambda: client.infer("ten", bare(0), timeout=1))[0] == "StatusCode.DEADLINE_EXCEEDED"
    many = bare(*range(MAX_IMAGES_PER_REQUEST + 1))
    assert refused(lambda: client.infer("ten", many))[0] == "StatusCode.RESOURCE_EXHAUSTED"
    too_large = tensor("image", [1], "BYTES", np.array([bytes(5 << 20)], dtype=np.object_))
    assert refused(lambda: client.infer("ten", too_large))[0] == "StatusCode.RESOURCE_EXHAUSTED"
    shared = triton.InferInput("pixels", [1, SIDE, SIDE, 3], "UINT8")
    shared.set_shared_memory("region", SIDE * SIDE * 3)
    assert "shared memory is not supported" in refused(lambda: client.infer("ten", [shared]))[1]
    for call in (client.get_trace_settings, lambda: client.load_model("ten"), client.get_system_shared_memory_status):
        assert refused(call)[0] == "StatusCode.UNIMPLEMENTED"


def forged(**changes: Any) -> pb.ModelInferRequest:
    """A request that no client of good will would send."""
    request = pb.ModelInferRequest(model_name="ten")
    request.inputs.add(name="pixels", datatype="UINT8", shape=[1, SIDE, SIDE, 3])
    for name, value in changes.items():
        if name == "shape":
            request.inputs[0].shape[:] = value
        elif name == "raw":
            request.raw_input_contents.extend(value)
        elif name == "uints":
            request.inputs[0].contents.uint_contents.extend(value)
        elif name == "file":
            request.inputs[0].name, request.inputs[0].datatype = "image", "BYTES"
            request.inputs[0].shape[:] = [1]
            request.raw_input_contents.append(value)
    return request


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (forged(shape=[1 << 60, SIDE, SIDE, 3], raw=[b""]), "at most"),
        (forged(shape=[-1, SIDE, SIDE, 3], raw=[b""]), "is required"),
        (forged(raw=[b"short"]), "5 bytes; 768 are required"),
        (forged(raw=[bytes(768), bytes(768)]), "more raw contents"),
        (forged(), "0 numbers; 768 are required"),
        (forged(uints=[256] * 768), "over 255"),
        (forged(file=struct.pack("<I", 1 << 31)), "beyond the data"),
        (forged(file=struct.pack("<I", 2) + b"abcd"), "beyond the last element"),
        (forged(file=b"\1"), "beyond the last element"),
    ],
)
def test_forged_requests_are_refused(address: str, request_: pb.ModelInferRequest, message: str) -> None:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request_)
    assert message in str(caught.value.details())


def test_typed_contents_do_as_well_as_raw_ones(rig: ElasticRig, address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        request = forged(uints=pixels(2).flatten().tolist())
        response = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    logits_C = np.frombuffer(response.raw_output_contents[0], np.float32)
    gamma = response.parameters["gamma"].int64_param
    np.testing.assert_allclose(logits_C, rig.direct(TEN, pixels(2), gamma), atol=1e-4)
