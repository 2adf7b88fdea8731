"""On a GPU: the answers of a processor, eager, compiled and as captured graphs; prompts learned; a profile measured."""

from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.cloud.elastic.model.runner import ElasticRunner, NumberType
from isthmus.cloud.elastic.prepare import profiler
from isthmus.cloud.elastic.prepare.precision import choose, noise
from isthmus.cloud.elastic.prepare.prompts import learn_task
from tests.rigs.elastic import prompts
from tests.rigs.elastic.runner import PICTURES_BHWC, PIXELS, model, some_tasks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU = torch.device("cuda")


def far(runner: ElasticRunner, gamma: int, count: int = 6) -> float:
    """The largest distance of an answer to six queries of four tasks from the processor's in float32, as a share."""
    plain = ElasticRunner(model(), PIXELS)
    pictures, tasks = PICTURES_BHWC[:count], some_tasks(runner)[:count]
    pairs = zip(
        runner.answer(pictures, gamma, tasks), plain.answer(pictures, gamma, some_tasks(plain)[:count]), strict=True
    )
    return max(float(np.linalg.norm(mine - own) / np.linalg.norm(own)) for mine, own in pairs)


@pytest.mark.parametrize("gamma", [-3, 0, 2])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("number_type", "most"), [("float32", 0.02), ("bfloat16", 0.15)])
def test_it_answers_as_a_processor_does(number_type: NumberType, most: float, graphs: bool, gamma: int) -> None:
    runner = ElasticRunner(model(), PIXELS, device="cuda", number_type=number_type, graphs=graphs)
    for count in (6, 5, 6):  # the second fills the first one's bucket up; the third replays its graph
        assert far(runner, gamma, count) < most


@pytest.mark.parametrize("gamma", [-3, 2])
def test_compiled_and_captured(gamma: int) -> None:
    assert far(ElasticRunner(model(depth=3), PIXELS, device="cuda", compiler="inductor"), gamma) < 0.02


def test_a_number_type_is_chosen_and_a_profile_measured() -> None:
    chosen = choose(model(), PIXELS, noise(PIXELS.size_px), device="cuda", repeats=2)
    assert {one.number_type for one in chosen.measured} == {"float32", "bfloat16"}
    profile = profiler.measure(
        ElasticRunner(model(), PIXELS, device="cuda", number_type=chosen.number_type),
        gammas=(-3, 0, 2),
        sizes=(1, 4),
        repeats=2,
    )
    assert profile.key.device == torch.cuda.get_device_name(GPU)
    assert all(seconds > 0 for row in profile.latency_s.values() for seconds in row)


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_prompts_are_learned(tmp_path: Path, mode: str) -> None:
    losses: dict[str, list[float]] = {}
    learn_task(
        prompts.model(),
        prompts.PIXELS,
        prompts.bright_or_dark(),
        2,
        prompts.config("append" if mode == "append" else "replace"),
        folder=tmp_path,
        device=GPU,
        on_epoch=lambda what, report: losses.setdefault(what, []).append(report.loss),
    )
    assert losses["head"][-1] < losses["head"][0]
    assert losses["prompts 2"][-1] < losses["prompts 1"][0]
