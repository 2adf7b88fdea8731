"""Experts from a dense model to answers: learned, profiled, replayed and served; and everything that is refused."""

import asyncio
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.timm_import import create_model
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit, pixel_spec
from isthmus.cloud.elastic.scheduling.levels import fewer_of, level_of, said
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.serve.host import open_elastic
from isthmus.cloud.elastic.serve.settings import ElasticSettings
from isthmus.cloud.elastic.tasks.files import TaskFiles, load_tasks
from isthmus.cloud.elastic.tasks.router import TaskRouter
from isthmus.cloud.rpc.elastic_client import registration
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import InvalidInput
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import refusal
from tests.rigs.elastic.vit import save_vit

SIDE = 16


def run(command: str, **options: object) -> tuple[int, str]:
    args: list[str] = []
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            args.append(f"--{name.replace('_', '-')}={each}")
    done = CliRunner().invoke(app, [command, *args, *(() if command == "replay" else ("--threads=1", "--device=cpu"))])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, pictures of four labels, two tasks on them; a model with experts and a profile made of these."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    vit = create_model("vit_tiny_patch16_224", pretrained=False, img_size=SIDE, patch_size=4, depth=4, num_classes=4)
    save_vit(vit, folder / "dense.safetensors")
    rng, rows = np.random.default_rng(0), []
    for label in [0, 1, 2, 3] * 12:
        out = io.BytesIO()
        picture = rng.integers(0, 60, (SIDE, SIDE, 3), np.uint8)
        picture[:, : SIDE // 2] += np.uint8(150 * (label % 2))
        picture[: SIDE // 2] += np.uint8(40 * (label // 2))
        Image.fromarray(picture).save(out, "PNG")
        rows.append({"image": {"bytes": out.getvalue(), "path": None}, "label": label})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pictures.parquet")
    for name, classes in (("left", [0, 1, 0, 1]), ("top", [0, 0, 1, 1])):
        recipe = {"name": name, "classes": ["dark", "bright"], "class_of_label": classes}
        (folder / f"{name}.json").write_text(json.dumps(recipe), encoding="utf-8")
    told = learn(folder, folder / "out", [folder / "left.json", f"{folder / 'top.json'}@{folder / 'pictures.parquet'}"])
    assert told[0] == 0, told[1]
    assert "2 x 16 experts" in told[1]
    data, out = folder / "pictures.parquet", folder / "profile.json"
    told = run(
        "profile",
        model=folder / "out" / "model",
        tasks=folder / "out" / "tasks",
        data=data,
        out=out,
        gammas="-4,0",
        sizes="1,8",
        repeats=1,
        number_type="float32",
    )
    assert told[0] == 0, told[1]
    return folder


def learn(folder: Path, out: Path, tasks: list[object], **changes: object) -> tuple[int, str]:
    options: dict[str, object] = {"model": folder / "dense.safetensors", "pixels": "half", "measured": "-4,0"}
    options |= {"data": folder / "pictures.parquet", "epochs": 2, "batch_size": 16, "task": tasks, "out": out}
    return run("experts", **{**options, **changes})


def tasks_of(folder: Path) -> list[TaskFiles]:
    return load_tasks(folder / "out" / "tasks", ElasticViT(load_vit(folder / "out" / "model")).shape)


def test_the_command_writes_a_model_and_its_tasks(folder: Path) -> None:
    left, top = tasks_of(folder)
    assert (left.spec.name, top.spec.name) == ("left", "top")
    assert set(left.spec.accuracy) == {level_of(gamma, fewer) for gamma in (-4, 0) for fewer in range(4)}
    assert left.spec.accuracy[0] == 1.0
    assert left.weights.router is not None and top.weights.router is not None
    busiest = [int(each.weights.router.bias_ME[0].argmax()) // 4 for each in (left, top) if each.weights.router]
    assert busiest == [0, 1], "tasks begin on experts of their own"
    again = learn(
        folder, folder / "out", [folder / "left.json", f"{folder / 'top.json'}@{folder / 'pictures.parquet'}"]
    )
    assert again[0] == 0, "a finished run goes on from its last checkpoint"


@pytest.mark.parametrize(
    ("router", "window", "start"), [("shared", None, "apart"), ("task", 4, "apart"), ("task", None, "even")]
)
def test_every_form_of_router_is_learned_and_written(
    folder: Path, tmp_path: Path, router: str, window: int | None, start: str
) -> None:
    options: dict[str, object] = {"router": router, "start": start, "epochs": 1, "pictures": 16}
    if window:
        options["window"] = window
    told = learn(folder, tmp_path / "out", [folder / "left.json", folder / "top.json"], **options)
    assert told[0] == 0, told[1]
    left, top = load_tasks(tmp_path / "out" / "tasks", ElasticViT(load_vit(tmp_path / "out" / "model")).shape)
    assert left.weights.router is not None and top.weights.router is not None
    spans = [(each.weights.router.first, each.weights.router.count) for each in (left, top) if each.weights.router]
    assert spans == ([(0, 4), (12, 4)] if window else [(0, 16), (0, 16)])
    alike = np.array_equal(left.weights.router.weight_MDE, top.weights.router.weight_MDE)
    assert alike == (router == "shared")


def test_a_profile_holds_every_level_and_policies_use_them(folder: Path, tmp_path: Path) -> None:
    profile = Profile.from_json((folder / "profile.json").read_text())
    assert profile.experts == 4
    assert profile.gammas == tuple(sorted(level_of(gamma, fewer) for gamma in (-4, 0) for fewer in range(4)))
    # With times as on a large model, fewer experts are faster.
    times_s = {level: (0.01 - 0.002 * fewer_of(level), 0.08 - 0.016 * fewer_of(level)) for level in profile.gammas}
    shares = {level: 0.95 - 0.05 * fewer_of(level) - 0.1 * (level % 10_000 != 0) for level in profile.gammas}
    profile = dataclasses.replace(profile, latency_s=times_s, memory={}, accuracy={"left": shares, "top": shares})
    (tmp_path / "profile.json").write_text(profile.to_json())
    for policy in ("priced", "otas", "exact", "throughput", "fixed:-20000"):
        out = tmp_path / f"{policy.replace(':', '')}.json"
        told = run("replay", profile=tmp_path / "profile.json", policy=policy, load=2, duration_s=5, out=out)
        assert told[0] == 0, told[1]
        used = {int(level): count for level, count in json.loads(out.read_text())["gammas"].items() if count}
        assert any(fewer_of(level) for level in used), (policy, used)
        assert all(f"{said(level, 4)}: {count}" in told[1] for level, count in used.items())


def test_what_cannot_be_learned_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    both: list[object] = [folder / "left.json", folder / "top.json"]
    cases: list[tuple[list[object], dict[str, object], str]] = [
        (both, {"experts": 2, "used": 1}, "2 experts of 192 units are not an MLP of 768"),
        (both, {"used": 17}, "17 of 16 experts per token"),
        (both, {"window": 17}, "windows of 17 among 16"),
        (both, {"measured": "0,2"}, "gammas above 0 need prompts"),
        ([both[0], both[0]], {}, "each must be there once"),
        (["none"], {}, "neither a file nor one of"),
        (both, {"model": folder / "out" / "model"}, "has experts already"),
    ]
    for tasks, changes, why in cases:
        code, told = learn(folder, tmp_path / "none", tasks, **changes)
        assert code == 1 and why in told, told
    ask = {"out": tmp_path / "p.json", "gammas": "0"}
    code, told = run("profile", model=folder / "dense.safetensors", pixels="half", experts="1", **ask)
    assert code == 1 and "no experts" in told
    code, told = run("profile", model=folder / "out" / "model", experts="5", **ask)
    assert code == 1 and "from 1 to 4 per token" in told
    code, told = run(
        "prompts",
        model=folder / "out" / "model",
        data=folder / "pictures.parquet",
        task=folder / "left.json",
        out=tmp_path,
        measured="0",
    )
    assert code == 1 and "its tasks are made by 'isthmus elastic experts'" in told


def served(folder: Path, state: Path, made: list[TaskFiles], asked: Any, **changes: object) -> Any:
    settings: dict[str, Any] = {"elastic_model": str(folder / "out" / "model"), "state": state}
    settings |= {"elastic_profile": folder / "profile.json", **changes}

    async def scenario() -> Any:
        server = Server(CloudSettings(**settings))
        port = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = pb_grpc.ElasticServiceStub(channel)
                for one in made:
                    await stub.RegisterTask(registration(one.spec, one.weights.to_bytes()))
                return await asked(stub, server)
        finally:
            await server.stop()

    return asyncio.run(scenario())


def pixels(seed: int) -> pb.Pixels:
    raw = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return pb.Pixels(rgb=raw.tobytes(), height=SIDE, width=SIDE)


@pytest.mark.parametrize(
    ("policy", "level", "limited", "executor"),
    [
        ("fixed:0", 0, False, "thread"),
        ("fixed:-20000", -20_000, True, "thread"),
        ("fixed:-10004", -10_004, False, "thread"),
        ("fixed:-10000", -10_000, True, "process"),
    ],
)
def test_a_server_answers_as_the_model_itself(
    folder: Path, tmp_path: Path, policy: str, level: int, limited: bool, executor: str
) -> None:
    made = tasks_of(folder)
    files = load_vit(folder / "out" / "model")
    runner = ElasticRunner(ElasticViT(files), pixel_spec(files, folder / "out" / "model"))

    async def asked(stub: Any, server: Server) -> list[Any]:
        requests = [
            pb.MakeQueryRequest(task=made[number % 2].spec.name, pixels=pixels(number), latency_s=60)
            for number in range(6)
        ]
        return list(await asyncio.gather(*(stub.MakeQuery(request) for request in requests)))

    limit = 4 * 4 * (2 * 192 * 192 + 2 * 192)
    changes: dict[str, object] = {"elastic_expert_bytes": limit} if limited else {}
    changes["executor"] = executor
    replies = served(folder, tmp_path / "state", made, asked, elastic_policy=policy, **changes)
    for number, reply in enumerate(replies):
        raw = np.frombuffer(pixels(number).rgb, np.uint8).reshape(1, SIDE, SIDE, 3)
        (wanted_C,) = runner.answer(raw, level, [runner.prepare(made[number % 2].weights)])
        np.testing.assert_allclose(reply.logits, wanted_C, atol=1e-4)
        assert (reply.gamma, reply.experts) == ((level % -10_000) or 0, 4 - fewer_of(level))


def test_routers_that_do_not_fit_are_refused_by_the_server(folder: Path, tmp_path: Path) -> None:
    (left, _) = tasks_of(folder)
    assert left.weights.router is not None
    router = left.weights.router
    narrow = TaskRouter(router.weight_MDE[:, :64], router.bias_ME, 0, 16)

    async def asked(stub: Any, server: Server) -> list[tuple[grpc.StatusCode, str]]:
        given = [dataclasses.replace(left.weights, router=each) for each in (None, narrow)]
        return [await refusal(stub.RegisterTask(registration(left.spec, each.to_bytes()))) for each in given]

    (missing, other) = served(folder, tmp_path / "state", [], asked)
    assert missing[0] == other[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert "router.weight is missing" in missing[1]
    assert "router.weight is 2 x 64 x 16; this model's experts need 2 x 192 x 16" in other[1]


def test_a_floor_of_accuracy_and_a_fixed_gamma_permit_numbers_of_experts(folder: Path, tmp_path: Path) -> None:
    left, _ = tasks_of(folder)
    shares = {level: 0.9 if fewer_of(level) == 0 else 0.5 for level in left.spec.accuracy}
    left = dataclasses.replace(left, spec=dataclasses.replace(left.spec, accuracy=shares))

    async def asked(stub: Any, server: Server) -> list[Any]:
        terms: list[dict[str, Any]] = [{"min_accuracy": 0.8}, {"gamma": -4}, {"gamma": -4, "min_accuracy": 0.8}]
        return [
            await stub.MakeQuery(pb.MakeQueryRequest(task="left", pixels=pixels(1), latency_s=60, **each))
            for each in terms
        ]

    floor, fixed, both = served(folder, tmp_path / "state", [left], asked)
    assert floor.experts == 4
    assert fixed.gamma == -4
    assert (both.gamma, both.experts) == (-4, 4)


def test_a_server_does_not_start_with_a_folder_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "out" / "model", tmp_path / "model"))
    (copy / "experts" / "1-7.safetensors").unlink()
    database = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    database.migrate()
    artefacts = Artefacts(str(tmp_path / "artefacts"))

    def opened(**changes: Any) -> None:
        settings = ElasticSettings(**{"model": str(copy), "state": tmp_path, **changes})
        open_elastic(settings, database, artefacts)

    with pytest.raises(InvalidInput, match=r"1-7\.safetensors is missing; copy the model's folder again"):
        opened(profile=folder / "profile.json")
    whole = str(folder / "out" / "model")
    with pytest.raises(InvalidInput, match="is too small for 2 experts: give at least"):
        opened(model=whole, profile=folder / "profile.json", expert_bytes=1_000)
    with pytest.raises(InvalidInput, match="does not run compiled"):
        opened(model=whole, profile=folder / "profile.json", compiler="eager")
    with pytest.raises(InvalidInput, match=r"dense\.safetensors has no experts"):
        opened(model=str(folder / "dense.safetensors"), pixels="half", profile=folder / "profile.json", expert_bytes=1)
