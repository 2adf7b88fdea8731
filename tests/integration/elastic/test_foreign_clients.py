"""Clients that others wrote, unchanged, against a running service: KServe's two, and clients that only use reflection.

KServe's client and grpc-requests need packages that this project does not. 'make clients' makes an environment that has
them; ISTHMUS_CLIENTS_PYTHON names the Python of another one.
"""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.rigs.elastic.server import THREE, ElasticRig, pixels, png
from tests.rigs.project.patience import HANGS_S
from tests.rigs.project.system import missing

TEN = THREE[0]
FOREIGN = Path(__file__).parent / "foreign"
CLIENTS = Path(__file__).parents[3] / ".venv-clients" / "bin" / "python"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> ElasticRig:
    return ElasticRig(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def address(rig: ElasticRig) -> Iterator[str]:
    (rig.folder / "picture.png").write_bytes(png(pixels(5)))
    with rig.serving(TEN, http="127.0.0.1:0") as address:
        yield address


def asked(script: str, address: str, rig: ElasticRig) -> Any:
    python = os.environ.get("ISTHMUS_CLIENTS_PYTHON") or str(CLIENTS)
    if not Path(python).exists():
        missing("no environment with kserve and grpc-requests: run 'make clients'")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [python, str(FOREIGN / script), address, TEN.spec.name, str(rig.folder / "picture.png")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_kserves_http_client_is_answered_with_binary_data_and_as_json(rig: ElasticRig, address: str) -> None:
    answer = asked("ask_by_kserve_rest.py", f"127.0.0.1:{rig.http_port}", rig)
    assert answer["live"] is True and answer["ready"] is True and answer["model_ready"] is True
    for each in answer["answers"]:
        np.testing.assert_allclose(each["logits"][0], rig.direct(TEN, pixels(5), 0), atol=1e-4)
        assert each["parameters"]["gamma"] == 0 and each["parameters"]["in_time"] is True
    assert "parameter 'latency_s': must be a number, or a string that is one" in answer["refusal"]


def test_kserves_client_is_answered_and_reads_the_times(rig: ElasticRig, address: str) -> None:
    answer = asked("ask_by_kserve.py", address, rig)
    assert answer["ready"] is True and answer["live"] is True
    told = answer["parameters"]
    gamma = told["gamma"]
    np.testing.assert_allclose(answer["logits"][0], rig.direct(TEN, pixels(5), gamma), atol=1e-4)
    assert told["in_time"] is True and told["queue_us"] >= 0 and told["run_us"] > 0
    assert "parameter 'latency_s': must be a number, or a string that is one" in answer["refusal"]


def test_a_client_that_knows_only_reflection_is_answered(rig: ElasticRig, address: str) -> None:
    answer = asked("ask_by_reflection.py", address, rig)
    assert {"inference.GRPCInferenceService", "isthmus.v1.ElasticService"} <= set(answer["services"])
    (raw, _label) = answer["inferred"]["raw_output_contents"]
    logits_C = np.frombuffer(base64.b64decode(raw), "<f4")
    gamma = int(answer["inferred"]["parameters"]["gamma"].get("int64_param", 0))
    np.testing.assert_allclose(logits_C, rig.direct(TEN, pixels(5), gamma), atol=1e-4)
    assert answer["made"]["class_name"] in TEN.spec.classes


@pytest.mark.parametrize("latency", [{"string_param": "30.5"}, {"double_param": 30.5}, {"int64_param": 30}])
def test_a_message_made_from_reflection_alone_is_answered(
    rig: ElasticRig, address: str, latency: dict[str, Any]
) -> None:
    with grpc.insecure_channel(address) as channel:
        known = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = known.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
        made = message_factory.GetMessageClass(method.input_type)(model_name="ten")
        made.inputs.add(name="pixels", datatype="UINT8", shape=[1, *pixels(5).shape])
        made.raw_input_contents.append(pixels(5).tobytes())
        for name, value in latency.items():
            setattr(made.parameters["latency_s"], name, value)
        reply_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply_class.FromString,
        )
        reply = call(made, timeout=HANGS_S)
    logits_C = np.frombuffer(reply.raw_output_contents[0], "<f4")
    gamma = reply.parameters["gamma"].int64_param
    np.testing.assert_allclose(logits_C, rig.direct(TEN, pixels(5), gamma), atol=1e-4)
    for name in ("queue", "run"):
        seconds, micros = reply.parameters[f"{name}_s"].double_param, reply.parameters[f"{name}_us"].int64_param
        assert micros == round(seconds * 1e6)


@pytest.mark.parametrize("text", ["soon", "", "0.5s", "1e999", "nan", "infinity", "0x10", "9" * 30, "--1", "1_0"])
def test_a_string_that_is_no_number_is_refused(address: str, text: str) -> None:
    from isthmus.proto.open_inference import inference_pb2 as pb
    from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc

    request = pb.ModelInferRequest(model_name="ten", raw_input_contents=[pixels(5).tobytes()])
    request.inputs.add(name="pixels", datatype="UINT8", shape=[1, *pixels(5).shape])
    request.parameters["latency_s"].string_param = text
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=HANGS_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
