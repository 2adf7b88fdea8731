"""`isthmus elastic replay --server`: a trace's queries through gRPC to a running server, beside the same simulated."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from isthmus.cloud.commands.elastic import app
from isthmus.cloud.commands.load import server_replay
from isthmus.cloud.commands.load.server_replay import sums
from isthmus.cloud.elastic.scheduling.levels import level_of
from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe
from isthmus.cloud.load.replay import Ended, figures
from isthmus.data.images import LabelledImages, write_images
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import ElasticRig, Made, pixels, tiny_profile

TEN = Made.random("ten", 10, gammas=(), seed=1)
PICTURES = [pixels(seed) for seed in range(12)]


@pytest.fixture
def rig(tmp_path: Path) -> ElasticRig:
    rig = ElasticRig(tmp_path)
    profile = tiny_profile(5e-3).with_task("ten", {-4: 0.7, 0: 1.0, 2: 0.0})
    (tmp_path / "profile.json").write_text(profile.to_json(), encoding="utf-8")
    labels = [int(rig.direct(TEN, picture, 0).argmax()) for picture in PICTURES]
    write_images(tmp_path / "pictures.parquet", LabelledImages(np.stack(PICTURES), np.array(labels)))
    (tmp_path / "tasks").mkdir()
    recipe = TaskRecipe("ten", TEN.spec.classes, tuple(range(10)))
    (tmp_path / "tasks" / "ten.recipe.json").write_text(json.dumps(asdict(recipe)), encoding="utf-8")
    return rig


def run(rig: ElasticRig, address: str, *flags: str, **changes: object) -> tuple[int, str]:
    options = {
        "server": address,
        "profile": rig.folder / "profile.json",
        "tasks": rig.folder / "tasks",
        "data": rig.folder / "pictures.parquet",
        "policy": "fixed:0",
        "load": 0.01,
        "duration_s": 2,
        "connections": 2,
        "out": rig.folder / "out.json",
        **changes,
    }
    args = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    done = CliRunner().invoke(app, ["replay", *args, *flags])
    return done.exit_code, done.output


def test_the_models_own_answers_are_right_and_in_time(rig: ElasticRig) -> None:
    with rig.serving(TEN, elastic_policy="fixed:0") as address:
        code, said = run(rig, address)
    assert code == 0, said
    found = json.loads((rig.folder / "out.json").read_text(encoding="utf-8"))
    assert found["queries"] > 0 and found["outcomes"][Outcome.WRONG_IN_TIME.value] == 0
    assert found["gammas"] == {"-4": 0, "0": found["queries"], "2": 0}
    in_time = found["outcomes"][Outcome.CORRECT_IN_TIME.value]
    assert in_time + found["outcomes"][Outcome.LATE.value] == pytest.approx(1.0)
    assert in_time > 0 and found["utility"] == pytest.approx(found["expected_utility"])
    simulated = found["simulated"]["simulated"]
    assert found["utility"] <= simulated["expected_utility"] + 1e-9
    assert simulated["utility"] == pytest.approx(simulated["expected_utility"]) == pytest.approx(found["bound"])
    assert "on the server right answers earn" in said
    assert list(found["simulated"])[1].startswith("simulated at ") and "ms on the way" in said


def test_right_answers_are_compared_in_pairs(rig: ElasticRig) -> None:
    made = Made.random("ten", 10, gammas=(), seed=5)  # one whose answers differ between gamma 0 and -4
    answers = {gamma: [int(rig.direct(made, picture, gamma).argmax()) for picture in PICTURES] for gamma in (-4, 0)}
    assert answers[-4] != answers[0]
    write_images(rig.folder / "pictures.parquet", LabelledImages(np.stack(PICTURES), np.array(answers[0])))
    # The server believes in another accuracy than the simulation, so the two choose different gammas.
    served = replace(made, spec=replace(made.spec, accuracy={-4: 0.9, 0: 0.1}))
    with rig.serving(served, elastic_policy="priced") as address:
        code, said = run(rig, address, "--paired", policy="priced")
    assert code == 0, said
    found = json.loads((rig.folder / "out.json").read_text(encoding="utf-8"))
    assert found["gammas"] == {"-4": found["queries"], "0": 0, "2": 0}
    for simulated in found["simulated"].values():  # at gamma 0, where every answer is right
        assert simulated["right_utility"] == pytest.approx(simulated["expected_utility"])
        assert simulated["answered"] == 1
    assert found["utility"] < found["bound"]
    assert 0 < found["generator_processor_share"] < 2 and found["outside_ms"]["p50"] > 0
    assert "in pairs" in said and "(100.0% known)" in said and "The load generator used" in said


def test_answers_that_nobody_can_ask_for_count_by_their_accuracy(rig: ElasticRig) -> None:
    with rig.serving(TEN, elastic_policy="fixed:-4") as address:
        code, said = run(rig, address, "--paired")
    assert code == 0 and "(0.0% known)" in said, said
    assert "answers in pairs are missing: the server answered 0 of" in said.replace("\n", " "), said
    found = json.loads((rig.folder / "out.json").read_text(encoding="utf-8"))
    for simulated in found["simulated"].values():
        assert simulated["right_utility"] == pytest.approx(simulated["expected_utility"])


def after_the_replay(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Does something between the last answer of the replay and the first question in pairs."""
    simulated = server_replay._simulated

    def acted(*args: Any) -> dict[str, Any]:
        act()
        return simulated(*args)

    monkeypatch.setattr(server_replay, "_simulated", acted)


def test_a_replay_keeps_its_figures_if_the_server_refuses_the_questions_in_pairs(
    rig: ElasticRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = replace(TEN, spec=replace(TEN.spec, accuracy={-4: 0.9, 0: 0.1}))
    with rig.serving(served, elastic_policy="priced") as address:

        def remove() -> None:
            with grpc.insecure_channel(address) as channel:
                pb_grpc.ElasticServiceStub(channel).RemoveTask(pb.RemoveTaskRequest(name="ten"))

        after_the_replay(monkeypatch, remove)
        code, said = run(rig, address, "--paired", policy="priced")
    said = " ".join(said.split())
    assert code == 1 and "the questions in pairs failed" in said and "Traceback" not in said, said
    assert "answers in pairs are missing: the server answered 0 of" in said and "NOT_FOUND" in said, said
    found = json.loads((rig.folder / "out.json").read_text(encoding="utf-8"))
    assert found["queries"] == found["gammas"]["-4"] > 0 and found["took"] > 0
    assert found["paired"]["asked"] > 0 == found["paired"]["answered"]
    assert found["paired"]["missing"].startswith("NOT_FOUND: ")
    for simulated in found["simulated"].values():
        assert simulated["answered"] == 0
        assert simulated["right_utility"] == pytest.approx(simulated["expected_utility"])


def test_a_replay_that_is_stopped_before_the_questions_in_pairs_has_written_its_figures(
    rig: ElasticRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server_replay, "right_at", stopped)
    with rig.serving(TEN, elastic_policy="fixed:0") as address:
        code, _ = run(rig, address, "--paired")
    assert code != 0
    found = json.loads((rig.folder / "out.json").read_text(encoding="utf-8"))
    assert found["queries"] > 0 and found["simulated"]["simulated"]["utility"] > 0
    assert found["paired"] == {"missing": "the replay was stopped before the server was asked"}


def test_what_does_not_go_together_is_one_line(rig: ElasticRig) -> None:
    for changes, told in (
        ({"data": None}, "--server needs --profile"),
        ({"policy": "infaas"}, "--server with --policy infaas needs --variants"),
        ({"margin": 0.1}, "leave out"),
        ({"profile": None}, "--server needs --profile"),
    ):
        code, said = run(rig, "127.0.0.1:1", **changes)
        assert code == 1 and told in said.replace("\n", " "), said
    with rig.serving() as address:  # the task is not registered
        code, said = run(rig, address)
    assert code == 1 and "ten" in said and "Traceback" not in said
    (rig.folder / "tasks" / "ten.recipe.json").unlink()
    code, said = run(rig, "127.0.0.1:1")
    assert code == 1 and "holds none of the profile's tasks: ten" in said.replace("\n", " ")


def test_time_on_the_way_makes_answers_of_the_last_moment_late() -> None:
    profile = paper_profile()
    queries = [Query(place, "CIFAR10", 0.0, 0.6, utility) for place, utility in enumerate((0.5, 0.25, 1.0))]
    right, evicted = Outcome.CORRECT_IN_TIME, Outcome.EVICTED
    run, ended = Run([right, right, evicted], []), {0: (0, 0.59), 1: (-20, 0.3)}
    assert sums(run, ended, queries, profile, 0.0)["utility"] == 0.75
    found = sums(run, ended, queries, profile, 0.02)
    assert found["utility"] == 0.25 and found["in_time"] == [(queries[1], -20)]
    assert found["expected_utility"] == pytest.approx(0.25 * profile.accuracy["CIFAR10"][-20])
    assert found["outcomes"]["late"] == found["outcomes"]["evicted"] == pytest.approx(1 / 3)


def test_figures_of_outcomes() -> None:
    profile = paper_profile()
    query = Query(0, "CIFAR10", 0.0, 0.6, 0.5)
    ended = [
        Ended(query, Outcome.CORRECT_IN_TIME, 0.0, 0.1, 0, 0.02),
        Ended(replace(query, id=1), Outcome.WRONG_IN_TIME, 0.0, 0.1, 0, 0.02),
        Ended(replace(query, id=2), Outcome.LATE, 0.0, 0.7, -20, 0.01),
        Ended(replace(query, id=3), Outcome.EVICTED, 0.0, 0.2),
        Ended(replace(query, id=4), None, 0.0, 0.2),
    ]
    found = figures(ended, profile)
    assert found["utility"] == 0.5 and found["expected_utility"] == pytest.approx(2 * 0.5 * 0.965)
    assert (found["batches"], found["mean_batch_size"], found["refused"]) == (2, 1.5, 1)
    assert found["gammas"]["0"] == 2 and found["gammas"]["-20"] == 1
    profiled_s = profile.batch_time_s(0, 2) + profile.batch_time_s(-20, 1)
    assert found["took"] == pytest.approx(0.03 / profiled_s)
    assert found["latency_ms"] is not None and np.isclose(found["latency_ms"]["p50"], 100.0)


def test_answers_of_fewer_experts_are_counted_at_their_level() -> None:
    paper = paper_profile()
    usual, fewer = level_of(0), level_of(0, 1)
    profile = replace(
        paper,
        gammas=(fewer, usual),
        accuracy={"CIFAR10": {fewer: 0.5, usual: 0.9}},
        latency_s={fewer: paper.latency_s[-20], usual: paper.latency_s[0]},
        experts=2,
    )
    query = Query(0, "CIFAR10", 0.0, 0.6, 1.0)
    ended = [
        Ended(query, Outcome.CORRECT_IN_TIME, 0.0, 0.1, 0, 0.02, experts=2),
        Ended(replace(query, id=1), Outcome.WRONG_IN_TIME, 0.0, 0.1, 0, 0.01, experts=1),
    ]
    found = figures(ended, profile)
    assert found["gammas"] == {str(fewer): 1, str(usual): 1}
    assert found["expected_utility"] == pytest.approx(0.9 + 0.5)
    assert found["took"] == pytest.approx(0.03 / (profile.batch_time_s(usual, 1) + profile.batch_time_s(fewer, 1)))


def test_an_answer_at_a_gamma_that_the_profile_lacks_is_said() -> None:
    ended = [Ended(Query(0, "CIFAR10", 0.0, 0.6, 0.5), Outcome.CORRECT_IN_TIME, 0.0, 0.1, -3, 0.02)]
    with pytest.raises(ValueError, match="answered at -3, which the profile lacks: --profile must be the server's"):
        figures(ended, paper_profile())
