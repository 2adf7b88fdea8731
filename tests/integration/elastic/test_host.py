"""A server for image tasks: its profile and model fit this machine or the error says why not; its command line."""

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.profiler import machine_key
from isthmus.cloud.elastic.scheduling.merge_order import MERGE_ORDERS
from isthmus.cloud.elastic.serve import host
from isthmus.cloud.elastic.serve.host import read_profile
from isthmus.cloud.elastic.serve.settings import PROFILE_FILE, ElasticSettings
from isthmus.proto.errors import InvalidInput
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import GAMMAS, THREE, ElasticRig, pixels, png, tiny_profile


@pytest.fixture
def rig(tmp_path: Path) -> ElasticRig:
    return ElasticRig(tmp_path)


def start(rig: ElasticRig, **changes: Any) -> None:
    async def scenario() -> None:
        async with rig.running(**changes):
            pass

    asyncio.run(scenario())


def test_a_missing_or_broken_profile_is_said_with_the_way_out(rig: ElasticRig) -> None:
    with pytest.raises(InvalidInput, match="no profile of this model; measure one with 'isthmus elastic profile'"):
        start(rig, elastic_profile=rig.folder / "none.json")
    broken = rig.folder / "broken.json"
    for text in ("", "{}", tiny_profile().to_json()[:-20]):
        broken.write_text(text)
        with pytest.raises(InvalidInput, match=r"broken\.json: .*--elastic-measure"):
            start(rig, elastic_profile=broken)


def test_the_first_start_measures_the_machine_by_itself_and_says_so(
    rig: ElasticRig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "PROGRESS_S", 0.0)
    caplog.set_level(logging.INFO, "isthmus.cloud")
    start(rig, elastic_profile=None, elastic_number_type="float32")
    kept = rig.folder / "state" / PROFILE_FILE
    assert "measuring how fast this machine runs the model, once" in caplog.text and str(kept) in caplog.text
    assert "measuring time: " in caplog.text and "images/s with all tokens" in caplog.text
    measured = read_profile(kept)
    assert 0 in measured.gammas and min(measured.gammas) < 0 < max(measured.gammas)
    caplog.clear()
    start(rig, elastic_profile=None)
    assert "measuring" not in caplog.text and read_profile(kept) == measured


def test_a_profile_of_another_machine_is_said_and_measured_anew_on_request(
    rig: ElasticRig, caplog: pytest.LogCaptureFixture
) -> None:
    kept = rig.folder / "state" / PROFILE_FILE
    kept.parent.mkdir()
    of_task = tiny_profile().with_task("ten", dict.fromkeys(GAMMAS, 0.5))
    small = dataclasses.replace(of_task, sizes=(1, 2), latency_s=dict.fromkeys(GAMMAS, (1.0, 2.0)))
    kept.write_text(small.to_json())
    start(rig, elastic_profile=None)
    assert "belongs to another machine (processor: measured with 'test'" in caplog.text
    caplog.clear()
    start(rig, elastic_profile=None, elastic_measure=True, elastic_number_type="float32")
    assert "belongs to another machine" not in caplog.text
    measured = read_profile(kept)
    assert measured.key == dataclasses.replace(machine_key(rig.runner), threads=1)  # the server's, not this process's
    assert (measured.gammas, measured.sizes, measured.accuracy) == (small.gammas, small.sizes, small.accuracy)
    assert all(seconds > 0 for row in measured.latency_s.values() for seconds in row)
    start(rig, elastic_profile=None)
    assert "belongs to another machine" not in caplog.text


@pytest.mark.parametrize("number_type", ["bfloat16", "int8"])
def test_a_server_of_fewer_bits_measures_itself(rig: ElasticRig, number_type: str) -> None:
    start(rig, elastic_profile=None, elastic_measure=True, elastic_number_type=number_type)
    assert read_profile(rig.folder / "state" / PROFILE_FILE).key.number_type == number_type


def test_the_number_type_is_the_quickest_that_answers_alike(
    rig: ElasticRig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "isthmus.cloud")
    start(rig, elastic_measure=True)
    (said,) = [record.getMessage() for record in caplog.records if "number type" in record.getMessage()]
    assert "float32" in said and "bfloat16" in said


def test_the_device_is_that_of_the_profile_and_a_measured_machine_uses_its_gpu(
    rig: ElasticRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = ElasticSettings(model="vit.safetensors", state=rig.folder)
    of_gpu = dataclasses.replace(tiny_profile(), key=dataclasses.replace(tiny_profile().key, device="NVIDIA H200"))
    for changes, profile, device in (
        ({}, tiny_profile(), "cpu"),
        ({}, of_gpu, "cuda"),
        ({}, None, "cuda"),
        ({"measure": True}, tiny_profile(), "cuda"),
        ({"device": "cpu"}, of_gpu, "cpu"),
    ):
        assert host.device_of(dataclasses.replace(settings, **changes), profile) == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert host.device_of(settings, of_gpu) == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elastic_model": "nowhere.safetensors"}, "--elastic-model: there is no file"),
        ({"elastic_pixels": "sepia"}, "--elastic-model: pixel statistics 'sepia'"),
        ({"elastic_policy": "luck"}, "--elastic-policy: no policy 'luck'; known are priced"),
        ({"elastic_policy": "infaas:2"}, "--elastic-policy: infaas chooses among models of several sizes"),
        ({"elastic_policy": "fixed:-9"}, "--elastic-policy"),
        ({"elastic_compiler": None, "elastic_device": "nonsense"}, "the model cannot be served: "),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(rig: ElasticRig, changes: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        start(rig, **changes)


def test_a_schedule_of_another_model_is_refused(rig: ElasticRig) -> None:
    other = dataclasses.replace(tiny_profile(), schedules={-4: (-4,) * 12})
    (rig.folder / "profile.json").write_text(other.to_json())
    with pytest.raises(InvalidInput, match="schedule of gamma -4"):
        start(rig)


def test_the_model_merges_in_the_order_of_its_profile(rig: ElasticRig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Recorded(ElasticViT):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self.merge_order)

    monkeypatch.setattr(host, "ElasticViT", Recorded)
    for order in MERGE_ORDERS:
        (rig.folder / "profile.json").write_text(dataclasses.replace(tiny_profile(), merge_order=order).to_json())
        start(rig)
        assert made.pop() == order and not made


def test_devices_and_tasks_are_served_on_one_port(rig: ElasticRig, tiny_release: Path) -> None:
    from isthmus.proto.v1 import isthmus_pb2, isthmus_pb2_grpc

    async def scenario() -> None:
        async with rig.running(THREE[0], release=tiny_release, workers=0) as (_, channel):
            enrol = isthmus_pb2.EnrolRequest(device_name="kiosk")
            assert (await isthmus_pb2_grpc.PersonalisationServiceStub(channel).Enrol(enrol)).token
            request = pb.MakeQueryRequest(task="ten", encoded=png(pixels(0)))
            assert (await pb_grpc.ElasticServiceStub(channel).MakeQuery(request)).class_name

    asyncio.run(scenario())


def test_reflection_shows_both_protocols(rig: ElasticRig) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def scenario() -> tuple[set[str], bytes]:
        async with rig.running() as (_, channel):
            ask = reflection_pb2.ServerReflectionRequest
            symbol = "inference.GRPCInferenceService"
            requests = [ask(list_services=""), ask(file_containing_symbol=symbol)]
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            listed, described = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
            names = {service.name for service in listed.list_services_response.service}
            return names, described.file_descriptor_response.file_descriptor_proto[0]

    names, described = asyncio.run(scenario())
    assert {"isthmus.v1.ElasticService", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
    assert "isthmus.v1.PersonalisationService" not in names
    assert b"ModelStreamInfer" in described


def test_tasks_are_registered_listed_asked_and_removed_from_the_command_line(rig: ElasticRig) -> None:
    key = rig.folder / "key"
    key.write_text("sesame")
    made = THREE[0]
    (rig.folder / "ten.json").write_text(made.spec.to_json())
    (rig.folder / "picture.png").write_bytes(png(pixels(1)))

    with rig.serving(elastic_key_file=key) as address:

        def isthmus(*words: str) -> tuple[int, str]:
            result = CliRunner().invoke(app, [*words, "--server", address, "--key-file", str(key)])
            return result.exit_code, result.stdout or result.stderr

        (rig.folder / "large.png").write_bytes(bytes(5 << 20))
        code, said = isthmus("query", "ten", str(rig.folder / "large.png"))
        assert (code, "shrink the picture" in said) == (1, True)
        code, said = isthmus("register", str(rig.folder / "ten.json"))
        assert (code, "its weights are missing" in said) == (1, True)
        (rig.folder / "ten.safetensors").write_bytes(made.weights.to_bytes())
        assert isthmus("register", str(rig.folder / "ten.json")) == (0, "ten version 1\n")
        assert isthmus("tasks") == (0, "ten\t1\t10\t2\t-4:70.0% 0:80.0% 2:90.0%\t-\n")
        model = str(rig.folder / "vit.safetensors")
        code, said = isthmus("register", "own", "--own-head", "--model", model)
        assert (code, "nothing names the 10 classes of the head: give --classes" in said) == (1, True)
        (rig.folder / "names.txt").write_text("\n".join(f"kind {index}" for index in range(10)))
        named = ("--own-head", "--model", model, "--classes", str(rig.folder / "names.txt"))
        assert isthmus("register", "own", *named) == (0, "own version 1\n")
        head = rig.runner.own_task()
        (logits_C,) = rig.runner.answer(pixels(1)[None], 0, [head])
        code, said = isthmus("query", "own", str(rig.folder / "picture.png"), "--latency", "30", "--utility", "100")
        assert (code, said.split("\t")[0]) == (0, f"kind {logits_C.argmax()}")
        assert isthmus("remove", "own") == (0, "")
        code, said = isthmus("query", "ten", str(rig.folder / "picture.png"), "--latency", "30", "--utility", "0.5")
        assert (code, said.startswith("ten-")) == (0, True)
        code, said = isthmus("query", "ten", str(rig.folder / "ten.json"))
        assert (code, "neither a JPEG nor a PNG" in said) == (1, True)
        (rig.folder / "large.jpg").write_bytes(bytes(5 << 20))
        code, said = isthmus("query", "ten", str(rig.folder / "large.jpg"))
        assert (code, "shrink the picture" in said) == (1, True)
        assert isthmus("remove", "ten") == (0, "")
        assert isthmus("remove", "ten")[0] == 1
        refused = CliRunner().invoke(app, ["tasks", "--server", address])
        assert (refused.exit_code, "ask the operator for the key" in refused.stderr) == (1, True)
