"""The Open Inference Protocol over HTTP: as JSON by hand, by Triton's own client, and everything that is refused."""

import base64
import http.client
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cloud.http.open_inference import MAX_BODY_BYTES
from tests.rigs.cloud.postgres import missing
from tests.rigs.elastic.server import PIXELS, THREE, ElasticRig, pixels, png
from tests.rigs.project.patience import HANGS_S
from tests.rigs.project.protobuf import TOO_NEW_FOR_TRITON

TEN = THREE[0]
KEY = "a-key-of-elastic-serving"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> ElasticRig:
    return ElasticRig(tmp_path_factory.mktemp("http"))


@pytest.fixture(scope="module")
def port(rig: ElasticRig) -> Iterator[int]:
    with rig.serving(*THREE, http="127.0.0.1:0"):
        assert rig.http_port is not None
        yield rig.http_port


def call(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS_S)
    try:
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, headers or {})
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def got(port: int, path: str, status: int = 200) -> Any:
    found, _, body = call(port, "GET", path)
    assert found == status, body
    return json.loads(body)


def image(seed: int = 0, **changes: Any) -> dict[str, Any]:
    text = base64.b64encode(png(pixels(seed))).decode()
    given = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"content_type": "base64"}}
    return {**given, "data": [text], **changes}


def asked(*inputs: Any, **changes: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), "parameters": {"latency_s": 60}, **changes}


def infer(port: int, body: Any, task: str = "ten", headers: dict[str, str] | None = None) -> Any:
    status, _, reply = call(port, "POST", f"/v2/models/{task}/infer", body, headers)
    assert status == 200, reply
    return json.loads(reply)


def refused(port: int, body: Any, task: str = "ten", headers: dict[str, str] | None = None) -> tuple[int, str]:
    status, _, reply = call(port, "POST", f"/v2/models/{task}/infer", body, headers)
    return status, json.loads(reply)["error"]


def test_server_and_models_describe_themselves(port: int) -> None:
    assert got(port, "/v2/health/live") == {"live": True} and got(port, "/v2/health/ready") == {"ready": True}
    assert got(port, "/v2")["name"] == "isthmus"
    for prefix in ("/v2/models/ten", "/v2/models/ten/versions/1"):
        found = got(port, prefix)
        assert found["inputs"][1] == {"name": "pixels", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}
        assert got(port, f"{prefix}/ready")["ready"] is True
    assert got(port, "/v2/models/other/ready", 404)["ready"] is False
    config = got(port, "/v2/models/ten/config")
    assert config["max_batch_size"] == 64 and config["parameters"]["gammas"] == {"string_value": "-4,0,2"}
    assert [dims for each in config["input"] for dims in each["dims"]] == [1, 16, 16, 3, 3, 16, 16]
    status, _, body = call(port, "POST", "/v2/repository/index", b"")
    assert status == 200 and {each["name"] for each in json.loads(body)} == {"ten", "pair", "five"}


def test_json_answers_as_the_model_itself(rig: ElasticRig, port: int) -> None:
    bare = {"name": "pixels", "shape": [1, 16, 16, 3], "datatype": "UINT8", "data": pixels(0).tolist()}
    flat = {**bare, "data": pixels(0).ravel().tolist()}
    standard = PIXELS.standardise(pixels(0)[None])
    tensor = {"name": "tensor", "shape": [1, 3, 16, 16], "datatype": "FP32", "data": standard.tolist()}
    for given in (image(), {**bare, "data": [bare["data"]]}, flat, tensor):
        reply = infer(port, asked(given, id="seven"))
        assert (reply["model_name"], reply["model_version"], reply["id"]) == ("ten", "1", "seven")
        logits, label = reply["outputs"]
        expected = rig.direct(TEN, pixels(0), reply["parameters"]["gamma"])
        np.testing.assert_allclose(logits["data"], expected, atol=1e-4)
        assert label["data"] == [TEN.spec.classes[int(expected.argmax())]] and reply["parameters"]["in_time"] is True
    statistics = got(port, "/v2/models/ten/stats")["model_stats"][0]
    assert statistics["inference_count"] >= 4 and statistics["inference_stats"]["success"]["ns"] > 0


def test_binary_data_goes_and_comes_behind_the_json(rig: ElasticRig, port: int) -> None:
    raw = pixels(3).tobytes()
    given = {"name": "pixels", "shape": [1, 16, 16, 3], "datatype": "UINT8"}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "label"}]
    header = json.dumps(asked({**given, "parameters": {"binary_data_size": len(raw)}}, outputs=outputs)).encode()
    status, headers, body = call(
        port,
        "POST",
        "/v2/models/ten/infer",
        header + raw,
        {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"},
    )
    assert status == 200, body
    length = int(headers["inference-header-content-length"])
    reply = json.loads(body[:length])
    assert reply["outputs"][0]["parameters"] == {"binary_data_size": 40} and len(body) == length + 40
    expected = rig.direct(TEN, pixels(3), reply["parameters"]["gamma"])
    np.testing.assert_allclose(np.frombuffer(body[length:], "<f4"), expected, atol=1e-4)
    assert reply["outputs"][1]["data"] == [TEN.spec.classes[int(expected.argmax())]]


def test_a_caller_fixes_gamma_or_asks_for_a_floor_of_accuracy(rig: ElasticRig, port: int) -> None:
    """The task's owner says 0.7 at gamma -4, 0.8 at 0 and 0.9 at 2."""
    for gamma in (-4, 0, 2):
        reply = infer(port, asked(image(4), parameters={"latency_s": 60, "gamma": gamma}))
        assert reply["parameters"]["gamma"] == gamma
        np.testing.assert_allclose(reply["outputs"][0]["data"], rig.direct(TEN, pixels(4), gamma), atol=1e-4)
    floor = infer(port, asked(image(4), parameters={"latency_s": 60, "min_accuracy": 0.85}))
    assert floor["parameters"]["gamma"] == 2
    for wish, message in (
        ({"gamma": -3}, "gamma -3: task 'ten' cannot run at it; it runs at -4, 0, 2"),
        ({"gamma": 0.5}, "parameter 'gamma': must be a whole number"),
        ({"min_accuracy": 0.95}, "min_accuracy 0.95: task 'ten' reaches 0.900 at its best gamma"),
        ({"min_accuracy": 0.85, "gamma": 0}, "min_accuracy 0.85: task 'ten' reaches 0.800 at gamma 0"),
        ({"min_accuracy": 2}, "min_accuracy must be from 0 to 1"),
    ):
        assert refused(port, asked(image(4), parameters=wish)) == (400, message)
    status, message = refused(port, asked(image(4), parameters={"gamma": 2}), task="five")
    assert (status, message) == (400, "gamma 2: task 'five' cannot run at it; it runs at -4, 0")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not UTF-8"),
        (b"[" * 100_000, 400, "nested too deeply"),
        ([], 400, "the body: must be an object"),
        ({"input": []}, 400, "the body: unknown field 'input'"),
        ({"inputs": {}}, 400, "inputs: must be a list"),
        ({"inputs": []}, 400, "inputs: exactly one of 'image', 'pixels' and 'tensor' is required"),
        ({"inputs": [{}] * 65}, 413, "inputs: at most 64"),
        (asked(image(shape="1")), 400, "input 'image': shape must be a list of whole numbers"),
        (asked(image(shape=[2**70])), 400, "input 'image': shape must be a list of whole numbers"),
        (asked(image(shape=[100], data=["", ""])), 413, "at most 64 images"),
        (asked(image(data=["???"])), 400, "input 'image': data holds a text that is not base64"),
        (asked(image(data=[7])), 400, "input 'image': data holds what is not BYTES"),
        (asked(image(data=None)), 400, "input 'image': data must be a list, or binary_data_size be given"),
        (asked(image(parameters={"binary_data_size": 5})), 400, "binary_data_size must be bytes of the body"),
        (asked(image(parameters={"shared_memory_region": "x"})), 400, "shared memory is not supported"),
        (asked(image(parameters={"content_type": []})), 400, "parameter 'content_type': must be a number, a text"),
        (asked(image(), id=7), 400, "id: must be a text"),
        (asked(image(), id="\ud800"), 400, "half of a surrogate pair"),
        (asked(image(name="\udfff")), 400, "half of a surrogate pair"),
        (asked(image(), model_name="pair"), 400, "model_name: it differs from that of the path"),
        (asked(image(), parameters={"latency_s": -1}), 400, "latency must be above 0"),
        (asked(image(), parameters={"colour": "red"}), 400, "unknown parameter 'colour'; the known ones are 'gamma'"),
        (asked(image(), outputs=[{"name": "scores"}]), 400, "outputs: 'logits' and 'label' exist"),
    ],
)
def test_wrong_bodies_are_refused_by_name(port: int, body: Any, status: int, message: str) -> None:
    found, said = refused(port, body)
    assert found == status and message in said, said


def test_wrong_lengths_and_encodings_are_refused(port: int) -> None:
    for length in ("-1", "9999", "soon", "1" * 40):
        status, said = refused(port, asked(image()), headers={"Inference-Header-Content-Length": length})
        assert status == 400 and "must be the length of the JSON" in said
    whole = json.dumps(asked(image())).encode()
    status, said = refused(port, whole + b"??", headers={"Inference-Header-Content-Length": str(len(whole))})
    assert status == 400 and "2 bytes of binary data beyond the last input" in said
    assert refused(port, whole, headers={"Content-Encoding": "gzip"})[0] == 400
    status, said = refused(port, b" " * (MAX_BODY_BYTES + 1))
    assert status == 413 and said == f"the body may have at most {MAX_BODY_BYTES} bytes"
    assert refused(port, asked(image()), task="other")[0] == 404
    assert call(port, "GET", "/v3")[0] == 404


def test_the_key_is_asked_for_and_health_is_open(tmp_path: Path) -> None:
    rig = ElasticRig(tmp_path)
    (tmp_path / "key").write_text(KEY)
    with rig.serving(http="127.0.0.1:0", elastic_key_file=tmp_path / "key"):
        assert rig.http_port is not None
        assert call(rig.http_port, "GET", "/v2/health/ready")[0] == 200
        for path in ("/v2", "/v2/models/ten", "/v2/models/stats", "/elsewhere"):
            assert call(rig.http_port, "GET", path)[0] == 401
            assert call(rig.http_port, "GET", path, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert call(rig.http_port, "GET", "/v2", headers={"Authorization": f"Bearer {KEY}"})[0] == 200


@pytest.mark.skipif(TOO_NEW_FOR_TRITON, reason="tritonclient needs an older protobuf")
def test_tritons_http_client_works_unchanged(rig: ElasticRig, port: int) -> None:
    try:
        import tritonclient.http as triton
    except RuntimeError:  # what the package raises without its extra "http"
        missing("tritonclient has no HTTP client here: install its extra 'http'")
    from tritonclient.utils import InferenceServerException

    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("ten")
        assert client.get_model_metadata("ten")["versions"] == ["1"]
        assert client.get_model_config("ten")["max_batch_size"] == 64
        assert {each["name"] for each in client.get_model_repository_index()} == {"ten", "pair", "five"}
        for name, kind, values in (
            ("image", "BYTES", np.array([png(pixels(seed)) for seed in (6, 7)], dtype=np.object_)),
            ("pixels", "UINT8", np.stack([pixels(seed) for seed in (6, 7)])),
            ("tensor", "FP32", PIXELS.standardise(np.stack([pixels(seed) for seed in (6, 7)]))),
        ):
            for binary in (True, False):
                if name == "image" and not binary:
                    continue  # JSON has no bytes; the client would send them as text
                given = triton.InferInput(name, list(values.shape), kind)
                given.set_data_from_numpy(values, binary_data=binary)
                outputs = [triton.InferRequestedOutput(each, binary_data=binary) for each in ("logits", "label")]
                for wanted in (outputs, None):
                    terms = {"latency_s": 60.0, "gamma": 0}
                    result = client.infer("ten", [given], outputs=wanted, request_id="x", parameters=terms)
                    logits_NC = result.as_numpy("logits")
                    for logits_C, seed in zip(logits_NC, (6, 7), strict=True):
                        np.testing.assert_allclose(logits_C, rig.direct(TEN, pixels(seed), 0), atol=1e-4)
                    best = [TEN.spec.classes[index] for index in logits_NC.argmax(axis=1)]
                    shown = [each.decode() if isinstance(each, bytes) else each for each in result.as_numpy("label")]
                    assert shown == best and result.get_response()["id"] == "x"
        ranked = triton.InferRequestedOutput("logits", class_count=2)
        given = triton.InferInput("pixels", [1, 16, 16, 3], "UINT8")
        given.set_data_from_numpy(pixels(6)[None])
        ((best, _),) = client.infer("ten", [given], outputs=[ranked]).as_numpy("logits")
        assert best.decode().count(":") == 2
        waiting = [client.async_infer("ten", [given]) for _ in range(8)]
        assert all(each.get_result().as_numpy("logits").shape == (1, 10) for each in waiting)
        assert client.get_inference_statistics("ten")["model_stats"][0]["name"] == "ten"
        with pytest.raises(InferenceServerException, match="other"):
            client.infer("other", [given])


def test_bytes_of_a_client_that_says_less_than_it_sends_are_not_misread(port: int) -> None:
    """The length of an element lies beyond the binary data."""
    raw = struct.pack("<I", 1_000) + b"short"
    given = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps(asked(given)).encode()
    status, said = refused(port, header + raw, headers={"Inference-Header-Content-Length": str(len(header))})
    assert status == 400 and "an element ends beyond the data" in said
