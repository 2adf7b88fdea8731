"""`isthmus elastic warmup` from pictures to a served store, and the experiment on it; errors in one line."""

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.serve.settings import PROFILE_FILE
from isthmus.cloud.elastic.tasks.files import load_tasks, order_of_task
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe
from isthmus.cloud.elastic.tasks.task import ModelShape, Task
from isthmus.cloud.elastic.warm.store import WarmStore
from isthmus.data.images import LabelledImages, read_images, write_images
from isthmus.data.made_by import code as this_code
from isthmus.experiments.cli import app as experiments
from isthmus.proto.errors import InvalidInput
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import ElasticRig, Made, png
from tests.rigs.elastic.vit import save_vit
from tests.rigs.elastic.warmup import bright_or_dark, tiny_vit

LEARNING = {"epochs": 1, "batch_size": 8, "learning_rate": 0.001, "numbers": "0,4,8", "middle": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors (17 tokens, 3 layers, 2 classes), train, test and unseen.parquet, and bright-dark.json."""
    folder = tmp_path_factory.mktemp("warmup")
    save_vit(tiny_vit(), folder / "model.safetensors")
    write_images(folder / "train.parquet", bright_or_dark(30))
    write_images(folder / "test.parquet", bright_or_dark(12, 9))
    write_images(folder / "unseen.parquet", bright_or_dark(10, 5))
    recipe = TaskRecipe("bright-dark", ("dark", "bright"), (0, 1))
    (folder / "bright-dark.json").write_text(json.dumps(asdict(recipe)))
    return folder


def warmup(folder: Path, command: str, **options: object) -> tuple[int, str]:
    common = {
        "model": folder / "model.safetensors",
        "data": folder / "train.parquet",
        "task": folder / "bright-dark.json",
        "pixels": "half",
        "threads": 1,
        "device": "cpu",
        "out": folder / "out",
        **LEARNING,
    }
    given = {name: value for name, value in {**common, **options}.items() if value is not None}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    done = CliRunner().invoke(app, ["warmup", command, *args])
    return done.exit_code, done.output


def test_from_pictures_to_a_server_and_an_experiment(folder: Path, tmp_path: Path) -> None:
    code, said = warmup(folder, "plan", time_budget_s=10_000)
    assert code == 0 and "predicted s" in said and "Next: 4 (an end of the interval)" in said
    code, said = warmup(folder, "run", time_budget_s=10_000)
    assert code == 0 and "no further" not in said, said
    code, said = warmup(folder, "ensemble")
    assert code == 0 and "Soups" in said, said
    store = WarmStore(folder / "out" / "models")
    assert {"vanilla", "tuned-4", "tuned-8"} <= set(store.names())

    profile = tmp_path / "profile.json"
    measured = ["--gammas=-8,-4,0", "--sizes=1,4", "--repeats=1", "--number-type=float32", "--threads=1"]
    model = [f"--model={folder / 'model.safetensors'}", "--pixels=half", "--device=cpu"]
    done = CliRunner().invoke(app, ["profile", *model, *measured, f"--warm={store.path}", f"--out={profile}"])
    assert done.exit_code == 0, done.output
    warmed = Profile.from_json(profile.read_text())
    assert set(warmed.models["bright-dark"]) == {-8, -4, 0}
    profiled = store.profiled()
    best = profiled.ranked(8)[0]
    assert warmed.models["bright-dark"][-8] == best and profiled.pictures > 0
    assert warmed.accuracy["bright-dark"][-8] == profiled.accuracy[best][8]

    options = ["--profile", str(profile), "--warm", str(store.path), "--out", str(tmp_path / "served")]
    grid = ["--seeds=0", "--loads=1,2", "--duration-s=1", "--policies=priced,throughput,clipper"]
    done = CliRunner().invoke(experiments, ["warmup", *options, *grid])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "served" / "result.json").read_text())
    assert result["code"] == [this_code()]
    assert len(result["cells"]) == 4 and "warmed over vanilla" in (tmp_path / "served" / "result.md").read_text()
    assert (tmp_path / "served" / "pictures" / "latency-synthetic.png").exists()

    live = ["synthetic", "--live", "--duration-s=1", "--load=0.5", f"--profile={profile}", f"--warm={store.path}"]
    live += [*model, f"--tasks={folder / 'out' / 'task'}", f"--data={folder / 'test.parquet'}"]
    done = CliRunner().invoke(app, ["replay", *live, f"--out={tmp_path / 'live.json'}"])
    assert done.exit_code == 0, done.output
    assert "warmed models:" in done.output
    told = json.loads((tmp_path / "live.json").read_text())
    assert told["warmed"]["missed"] == 0 and len(told["latencies_s"]) > 0

    several = [each for each in live if not each.startswith("--warm")] + ["--executors=2", "--executor=process"]
    done = CliRunner().invoke(app, ["replay", *several, f"--out={tmp_path / 'several.json'}"])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "several.json").read_text())
    assert told["executors"] == 2 and sum(told["outcomes"].values()) == pytest.approx(1)
    assert len(told["latencies_s"]) == sum(size for _, _, _, size, _, _ in told["each"]) > 0
    done = CliRunner().invoke(app, ["replay", *live, "--executors=2"])
    assert done.exit_code == 1 and "for one executor in a thread" in done.output


def test_a_server_answers_with_warmed_models(folder: Path, tmp_path: Path) -> None:
    code, said = warmup(folder, "run", out=tmp_path / "out")
    assert code == 0, said
    (task,) = load_tasks(tmp_path / "out" / "task", ModelShape(3, 64, 16))
    assert WarmStore(tmp_path / "out" / "models").merge_order() == "published"
    assert order_of_task(tmp_path / "out" / "task", "bright-dark") == "published"
    rig = ElasticRig(tmp_path)
    save_vit(tiny_vit(), tmp_path / "vit.safetensors")
    made = Made(replace(task.spec, default_latency_s=60.0), task.weights)
    picture = bright_or_dark(1).pictures_NHWC[0]
    warm = tmp_path / "out" / "models"

    async def scenario() -> str:
        async with rig.running(made, elastic_warm=warm, elastic_pixels="half") as (server, channel):
            assert server.elastic is not None and server.elastic.warm is not None
            request = pb.MakeQueryRequest(task="bright-dark", encoded=png(picture))
            answer = await pb_grpc.ElasticServiceStub(channel).MakeQuery(request)
            assert await asyncio.to_thread(server.elastic.warm.wait, 30)
            expected = server.elastic.live._engine.profile.accuracy["bright-dark"]
            assert expected[0] == server.elastic.warm.accuracy(Task(made.spec, made.weights), (0,))[0]
            return str(answer.class_name)

    assert asyncio.run(scenario()) in ("dark", "bright")


def test_a_warm_up_of_before_merging_had_an_order_goes_on_and_is_served_in_the_order_of_then(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said = warmup(folder, "run", out=out, merge_order="receiving-first")
    assert code == 0, said
    known = json.loads((out / "models" / "store.json").read_text())
    assert known.pop("merge_order") == "receiving-first"
    (out / "models" / "store.json").write_text(json.dumps(known))  # as stores of then
    code, said = warmup(folder, "run", out=out)
    assert code == 0 and "tuning for" not in said, said
    assert WarmStore(out / "models").merge_order() == "receiving-first"
    code, said = warmup(folder, "run", out=out, merge_order="published")
    said = " ".join(said.split())
    assert code == 1 and "was made with the order receiving-first. Leave the option out" in said, said

    profile = tmp_path / "warmed.json"
    asked = [f"--model={folder / 'model.safetensors'}", "--pixels=half", "--device=cpu", f"--warm={out / 'models'}"]
    asked += ["--gammas=-4,0", "--sizes=1", "--repeats=1", "--number-type=float32", "--threads=1", f"--out={profile}"]
    done = CliRunner().invoke(app, ["profile", *asked])
    assert done.exit_code == 0, done.output
    assert Profile.from_json(profile.read_text()).merge_order == "receiving-first"

    rig = ElasticRig(tmp_path)
    save_vit(tiny_vit(), tmp_path / "vit.safetensors")
    brief: dict[str, object] = {"elastic_profile": None, "elastic_pixels": "half", "elastic_number_type": "float32"}

    async def scenario() -> str:
        async with rig.running(elastic_warm=out / "models", **brief) as (server, _):
            assert server.elastic is not None
            return server.elastic.live._engine.profile.merge_order

    assert asyncio.run(scenario()) == "receiving-first", "the machine is measured in the order of the warmed models"

    own = rig.folder / "state" / PROFILE_FILE  # as a server that has measured its machine in another order
    own.write_text(replace(Profile.from_json(own.read_text()), merge_order="published").to_json())
    with pytest.raises(InvalidInput, match=r"order receiving-first, and the profile .* start once with --elastic-"):
        asyncio.run(scenario())
    brief["elastic_measure"] = True
    assert asyncio.run(scenario()) == "receiving-first"
    assert Profile.from_json(own.read_text()).merge_order == "receiving-first"


def test_token_pruning_from_pictures_to_the_answers_of_a_server(folder: Path, tmp_path: Path) -> None:
    """DynamicViT end to end: predictors are learned, the machine is profiled, and a server prunes as it is asked."""
    out, profile = tmp_path / "out", tmp_path / "pruned.json"
    pruning: dict[str, object] = {"reducer": "pruning", "numbers": "0,40,70", "middle": 40, "out": out}
    code, said = warmup(folder, "run", **pruning)
    assert code == 0 and "tuning for" in said, said
    known = json.loads((out / "models" / "store.json").read_text())
    for order in (None, "receiving-first"):  # stores of before named none, or that of then; pruning has none
        changed = {**known, "merge_order": order}
        (out / "models" / "store.json").write_text(
            json.dumps({name: value for name, value in changed.items() if value is not None})
        )
        code, said = warmup(folder, "run", **pruning)
        assert code == 0 and "tuning for" not in said, said
    model = folder / "model.safetensors"
    asked = [f"--model={model}", "--pixels=half", "--device=cpu", f"--warm={out / 'models'}", "--gammas=-70,-40,0"]
    asked += ["--sizes=1,4", "--repeats=1", "--number-type=float32", "--threads=1", f"--out={profile}"]
    done = CliRunner().invoke(app, ["profile", *asked])
    assert done.exit_code == 0, done.output
    measured = Profile.from_json(profile.read_text())
    assert set(measured.accuracy["bright-dark"]) == {-70, -40, 0}
    (task,) = load_tasks(out / "task", ModelShape(3, 64, 16))
    rig, made = ElasticRig(tmp_path), Made(replace(task.spec, default_latency_s=60.0), task.weights)
    served: dict[str, object] = {"elastic_model": str(model), "elastic_pixels": "half", "elastic_profile": profile}

    async def scenario() -> list[pb.MakeQueryResponse]:
        async with rig.running(made, elastic_warm=out / "models", **served) as (server, channel):
            assert server.elastic is not None and server.elastic.warm is not None
            stub, answers = pb_grpc.ElasticServiceStub(channel), []
            encoded = png(bright_or_dark(1).pictures_NHWC[0])
            for gamma in (-70, -40, 0):
                await stub.MakeQuery(pb.MakeQueryRequest(task="bright-dark", encoded=encoded, gamma=gamma))
                assert await asyncio.to_thread(server.elastic.warm.wait, 30)
                request = pb.MakeQueryRequest(task="bright-dark", encoded=encoded, gamma=gamma)
                answers.append(await stub.MakeQuery(request))
            return answers

    answers = asyncio.run(scenario())
    assert [each.gamma for each in answers] == [-70, -40, 0]
    assert all(np.isfinite(each.logits).all() for each in answers)
    assert not np.allclose(answers[0].logits, answers[2].logits)


def test_an_evaluation_is_a_grid_with_pictures(folder: Path, tmp_path: Path) -> None:
    options = {"test": folder / "test.parquet", "out": tmp_path, "seeds": "0", "time_share": 50.0}
    code, said = warmup(folder, "evaluate", profiling=folder / "unseen.parquet", vanilla_epochs=1, **options)
    assert code == 0 and "prodigy+soups" in said, said
    assert "other code" not in said, "the vanilla model in this folder was learned by this code, too"
    result = json.loads((tmp_path / "result.json").read_text())
    counts = result["pictures"]
    assert result["code"] == [this_code()]
    assert counts == {"learning": 30, "profiling": 10, "test": 12}
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    (task,) = load_tasks(tmp_path / "task", ModelShape(3, 64, 16))
    assert set(task.spec.accuracy) == {-8, -4, 0}
    (models,) = tmp_path.glob("seed-0/soups-0-*/models")
    assert {"vanilla", "tuned-4", "tuned-8"} <= set(WarmStore(models).profiled().accuracy)


def test_a_task_that_the_model_does_not_know_is_learned_first(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "details.parquet"
    args = [f"--data={folder / 'train.parquet'}", f"--out={made}", "--size-px=16", "--marks=1", "--seed=3"]
    done = CliRunner().invoke(app, ["warmup", "details", *args])
    assert done.exit_code == 0 and "generated details" in done.output
    assert set(read_images(made, 16).labels_N.tolist()) == {0, 1}
    options = {"data": made, "task": made.with_suffix(".json"), "out": tmp_path / "out"}
    code, said = warmup(folder, "run", vanilla_epochs=1, **options)
    assert code == 0, said
    assert (tmp_path / "out" / "vanilla.safetensors").exists()
    before = (tmp_path / "out" / "vanilla.safetensors").stat().st_mtime_ns
    assert warmup(folder, "run", vanilla_epochs=1, **options)[0] == 0
    assert (tmp_path / "out" / "vanilla.safetensors").stat().st_mtime_ns == before
    three = tmp_path / "three.json"
    three.write_text(json.dumps(asdict(TaskRecipe("three", ("a", "b", "c"), (0, 1, 2)))))
    code, said = warmup(folder, "plan", task=three, out=tmp_path / "three")
    assert code == 1 and "--vanilla-epochs" in said


def test_what_cannot_be_done_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, wanted in (
        ({"numbers": "0,4,9"}, "merges per layer must be from 0 to 8"),
        ({"time_budget_s": 1e-9}, "give at least --time-budget-s"),
        ({"storage_budget_bytes": 10}, "--storage-budget-bytes"),
        ({"middle": 5}, "middle number 5"),
    ):
        code, said = warmup(folder, "plan", out=out, **options)
        assert code == 1 and wanted in " ".join(said.split()), said
    code, said = warmup(folder, "plan", out=out, reducer="dropping")
    assert code == 2 and "'merging', 'pruning'" in said
    dark = bright_or_dark(20)
    write_images(tmp_path / "dark.parquet", LabelledImages(dark.pictures_NHWC[::2], np.zeros(10, np.int64)))
    code, said = warmup(folder, "plan", out=out, data=tmp_path / "dark.parquet")
    assert code == 1 and "holds no picture of bright" in said
    code, said = warmup(folder, "ensemble", out=out)
    assert code == 1 and "holds no plan" in said
    rig = ElasticRig(tmp_path)

    async def start() -> None:
        async with rig.running(elastic_warm=tmp_path / "nowhere"):
            pass

    with pytest.raises(InvalidInput, match=r"--elastic-warm: .*no warmed models"):
        asyncio.run(start())
