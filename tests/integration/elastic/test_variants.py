"""INFaaS in a server: models of several sizes are loaded and dropped within a memory budget while queries arrive."""

import asyncio
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app
from isthmus.cloud.elastic.variants.folder import FILE, Variants
from isthmus.cloud.elastic.variants.opening import Ready, opened
from isthmus.cloud.metrics.elastic import ElasticCollector
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.data.images import STATISTICS, LabelledImages, PixelSpec, write_images
from isthmus.proto.errors import InvalidInput
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import ElasticRig, Made, pixels, png, refusal
from tests.rigs.elastic.variants import SIDE, made, pictures, saved


@pytest.fixture
def rig(tmp_path: Path) -> ElasticRig:
    return ElasticRig(tmp_path)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks in three sizes."""
    return made(tmp_path_factory.mktemp("three")).folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks in two sizes."""
    return made(tmp_path_factory.mktemp("two"), levels=(-1, 0)).folder


def placed(rig: ElasticRig, source: Path) -> Variants:
    """Copies a folder of variants to where the rig's server looks."""
    shutil.copytree(source, rig.folder / "variants")
    return Variants.read(rig.folder / "variants")


def served(rig: ElasticRig, **changes: Any) -> dict[str, Any]:
    return {
        "elastic_model": None,
        "elastic_pixels": None,
        "elastic_profile": None,
        "elastic_variants": rig.folder / "variants",
        "elastic_policy": "infaas",
        **changes,
    }


def gigabytes(variants: Variants, *levels: int) -> str:
    """Returns the policy's name with room for models of these levels."""
    return f"infaas:{sum(variants.size(level).memory_bytes for level in levels) / 1e9}"


def query(task: str, seed: int, latency_s: float = 60.0) -> pb.MakeQueryRequest:
    return pb.MakeQueryRequest(task=task, encoded=png(pixels(seed)), latency_s=latency_s)


def alive() -> int:
    """Returns the number of open models of this process."""
    return sum(type(each) is Ready for each in gc.get_objects())


@pytest.mark.parametrize("executors", [1, 2])
def test_every_answer_is_that_of_the_named_size_and_memory_holds(rig: ElasticRig, three: Path, executors: int) -> None:
    variants = placed(rig, three)
    policy = gigabytes(variants, 1, -1)

    gc.collect()
    before = alive()

    async def scenario() -> None:
        async with rig.running(**served(rig, elastic_policy=policy, elastic_executors=executors)) as (server, channel):
            pool = server.elastic.variants if server.elastic else None
            assert pool is not None and len(pool.memories) == executors
            stub = pb_grpc.ElasticServiceStub(channel)
            listed = await stub.ListTasks(pb.ListTasksRequest())
            assert [task.description.name for task in listed.tasks] == ["pair", "ten"] and listed.image_px == SIDE
            for task in ("ten", "pair", "ten", "pair"):
                answers = await asyncio.gather(*(stub.MakeQuery(query(task, seed)) for seed in range(4)))
                for seed, answer in enumerate(answers):
                    ready = opened(
                        variants.file(task, answer.gamma), pixels="cifar10", device="cpu", number_type="float32"
                    )
                    (logits_C,) = ready.runner.answer(pixels(seed)[None], 0, [ready.task])
                    assert answer.class_index == int(logits_C.argmax())
                    np.testing.assert_allclose(answer.logits, logits_C, rtol=1e-4, atol=1e-4)
                most = executors * (variants.size(1).memory_bytes + variants.size(-1).memory_bytes)
                assert 0 < pool.bytes <= most
            for memory in pool.memories:
                assert 0 < sum(ready.bytes for ready in memory._models.values()) <= memory.bytes
            del ready
            held = sum(len(memory._models) for memory in pool.memories)
            assert alive() == before + held, "nothing else holds a model"
            registry = CollectorRegistry()
            registry.register(ElasticCollector(server.elastic.live, pool))  # type: ignore[union-attr]
            for name, value in (("loads_total", pool.loads), ("removals_total", pool.removals), ("bytes", pool.bytes)):
                assert registry.get_sample_value(f"isthmus_elastic_variant_{name}") == value

    asyncio.run(scenario())


def test_without_room_for_both_tasks_each_change_of_task_loads_a_model(rig: ElasticRig, two: Path) -> None:
    variants = placed(rig, two)

    async def scenario() -> None:
        async with rig.running(**served(rig, elastic_policy=gigabytes(variants, 0))) as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            assert server.elastic is not None and server.elastic.variants is not None
            pool = server.elastic.variants
            for number, task in enumerate(("ten", "pair", "pair", "ten")):
                await stub.MakeQuery(query(task, number))
            assert (pool.loads, pool.removals) == (2, 2), "the base model of 'ten' was there; 'pair' and 'ten' came"

    asyncio.run(scenario())


def test_clients_cannot_change_the_tasks_and_a_gamma_cannot_be_asked_for(rig: ElasticRig, two: Path) -> None:
    placed(rig, two)

    async def scenario() -> None:
        async with rig.running(**served(rig)) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            status, said = await refusal(stub.RegisterTask(Made.random("ten", 10, gammas=()).messages()))
            assert status is grpc.StatusCode.INVALID_ARGUMENT and "'isthmus elastic variants'" in said
            status, said = await refusal(stub.RemoveTask(pb.RemoveTaskRequest(name="pair")))
            assert status is grpc.StatusCode.INVALID_ARGUMENT and "--elastic-variants" in said
            status, said = await refusal(stub.MakeQuery(query("five", 0)))
            assert status is grpc.StatusCode.NOT_FOUND
            fixed = query("pair", 0)
            fixed.gamma = 0
            status, said = await refusal(stub.MakeQuery(fixed))
            assert status is grpc.StatusCode.INVALID_ARGUMENT and "decides the gamma" in said
            assert (await stub.MakeQuery(query("pair", 0))).class_name in ("low", "high")

    asyncio.run(scenario())


def test_a_file_that_goes_while_serving_fails_its_batches_alone(rig: ElasticRig, two: Path) -> None:
    variants = placed(rig, two)

    async def scenario() -> None:
        async with rig.running(**served(rig, elastic_policy=gigabytes(variants, 0))) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            shutil.move(variants.file("pair", 0), rig.folder / "away")
            shutil.move(variants.file("pair", -1), rig.folder / "gone")
            status, _ = await refusal(stub.MakeQuery(query("pair", 0)))
            assert status is grpc.StatusCode.INTERNAL
            assert (await stub.MakeQuery(query("ten", 0))).in_time

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elastic_policy": "priced"}, "model variants are served by INFaaS: add --elastic-policy infaas:GB"),
        ({"elastic_policy": "infaas:much"}, "--elastic-policy: infaas:GB needs the gigabytes"),
        ({"elastic_policy": "infaas:0.000001"}, "too little: the largest model takes"),
        ({"executor": "process"}, "--executor: the folder of --elastic-variants says how"),
        ({"elastic_measure": True, "elastic_pixels": "half"}, "--elastic-measure, --elastic-pixels: the folder"),
        ({"elastic_variants": Path("nowhere")}, "make the folder with 'isthmus elastic variants'"),
    ],
)
def test_what_does_not_go_with_variants_is_refused_at_the_start(
    rig: ElasticRig, two: Path, changes: dict[str, Any], message: str
) -> None:
    placed(rig, two)
    with pytest.raises(InvalidInput, match=message):
        asyncio.run(Server(rig.settings(**served(rig, **changes))).start())


def test_models_other_than_the_measured_ones_are_refused_at_the_start(rig: ElasticRig, two: Path) -> None:
    variants = placed(rig, two)
    cases = {
        "holds another model than when it was measured": Path(saved(rig.folder, "pair", 0, classes=3)),
        "is not a safetensors file or is damaged": rig.folder / "profile.json",
    }
    for message, source in cases.items():
        shutil.copyfile(source, variants.file("pair", 0))
        with pytest.raises(InvalidInput, match=message):
            asyncio.run(Server(rig.settings(**served(rig))).start())


def test_a_server_has_a_model_or_variants_and_says_so() -> None:
    with pytest.raises(ValueError, match="not both"):
        CloudSettings(state=Path("state"), elastic_model="m", elastic_variants=Path("v"))
    with pytest.raises(ValueError, match="--elastic-key-file"):
        CloudSettings(
            state=Path("state"), elastic_variants=Path("v"), listen="0.0.0.0:1", tls_cert=Path("c"), tls_key=Path("k")
        )


def run(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(each) for each in args])
    return done.exit_code, " ".join(done.output.split())


def test_from_files_to_a_replay_through_the_server(rig: ElasticRig) -> None:
    data = rig.folder / "pictures.parquet"
    labelled = pictures(PixelSpec(SIDE, *STATISTICS["cifar10"]))
    write_images(data, LabelledImages(labelled.pictures_NHWC, labelled.labels_N))
    folder = rig.folder / "variants"
    options = (
        "--data",
        data,
        "--pixels",
        "cifar10",
        "--threads",
        1,
        "--sizes",
        "1,64",
        "--repeats",
        1,
        "--out",
        folder,
    )
    models = [saved(rig.folder, "ten", level) for level in (-1, 0)]
    code, said = run("variants", "--task", "cifar10", "--base", models[1], *options)
    assert code == 1 and "give --small, --large or both" in said
    code, said = run("variants", "--task", "cifar10", "--small", models[0], "--base", models[1], *options)
    assert code == 0 and "small" in said and "loaded in, ms" in said, said
    assert json.loads((folder / FILE).read_text(encoding="utf-8"))["format"] == 1
    policy = gigabytes(Variants.read(folder), 0)
    replayed = ("replay", "--policy", policy, "--variants", folder, "--load", 0.01, "--duration-s", 2)
    code, said = run(*replayed)
    assert code == 0 and "no policy passes" in said, said
    with rig.serving(**served(rig, elastic_policy=policy)) as address:
        out = rig.folder / "out.json"
        code, said = run(*replayed, "--server", address, "--tasks", folder, "--data", data, "--out", out)
    assert code == 0, said
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["queries"] > 0 and set(found["gammas"]) == {"-1", "0"}
    assert [name.partition(" with ")[0] for name in found["simulated"]] == ["simulated", "simulated"]
    assert found["gammas"]["-1"] == 0, "the load is low, and warming up did not look like a high one"
    assert sum(found["gammas"].values()) == round(found["queries"] * (1 - found["outcomes"].get("evicted", 0)))


def test_options_of_a_replay_that_do_not_go_together(rig: ElasticRig, two: Path) -> None:
    folder = placed(rig, two).folder
    for args, message in (
        (("--variants", folder), "add --policy infaas:GB"),
        (("--variants", folder, "--policy", "infaas", "--profile", rig.folder / "profile.json"), "leave out --profile"),
        (("--policy", "infaas", "--live"), "start 'isthmus cloud serve --elastic-variants'"),
        (("--policy", "infaas", "--server", "127.0.0.1:1"), "needs --variants"),
        (("--variants", rig.folder, "--policy", "infaas"), "make the folder with"),
    ):
        code, said = run("replay", *args)
        assert code == 1 and message in said, said
