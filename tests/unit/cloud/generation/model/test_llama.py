"""The forward in float32 against a plain one in float64: all layouts of the KV cache, ragged steps, every option."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import ModelExecutor, make_cache
from isthmus.cloud.generation.model.kv import LAYOUTS, Span
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.scheduling.engine import Drawn, Engine, Token
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Request, Sampling
from tests.rigs.generation.llama import plain_greedy, plain_logits, save_tiny_llama

Tensors = dict[str, np.ndarray]
LIMITS = Limits(rows=4, blocks=64, block_tokens=4, step_tokens=64)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Tensors, LlamaConfig]:
    folder = tmp_path_factory.mktemp("tiny")
    config = save_tiny_llama(folder)
    return load_llama(folder, config), load_file(folder / "model.safetensors"), config


def whole(model: Llama, ids: list[int], layout: str = "slots") -> np.ndarray:
    cache = make_cache(layout, model, LIMITS)
    cache.begin([Span(0, 0, 0, len(ids), tuple(range(64)))])
    every = torch.arange(len(ids))
    found: np.ndarray = model(torch.tensor(ids), every, every, cache).numpy()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_plain_forward(layout: str, tiny: tuple[Llama, Tensors, LlamaConfig]) -> None:
    model, tensors, config = tiny
    ids = np.random.default_rng(1).integers(2, 300, 40).tolist()
    np.testing.assert_allclose(whole(model, ids, layout), plain_logits(tensors, config, ids), atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"model_type": "qwen2"},
        {"model_type": "mistral", "num_key_value_heads": 6, "sliding_window": 128},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
    ],
    ids=["untied", "qwen2", "mistral", "biases", "new-rope"],
)
def test_every_shape_of_llama_computes_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    config = save_tiny_llama(tmp_path, **changes)
    model, tensors = load_llama(tmp_path, config), load_file(tmp_path / "model.safetensors")
    ids = list(range(5, 25))
    np.testing.assert_allclose(whole(model, ids), plain_logits(tensors, config, ids), atol=1e-4)


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    config = save_tiny_llama(tmp_path / "one")
    save_tiny_llama(tmp_path / "many", shards=3)
    ids = [4, 9, 2, 7]
    one, many = (whole(load_llama(tmp_path / name, config), ids) for name in ("one", "many"))
    np.testing.assert_array_equal(one, many)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones(tmp_path: Path) -> None:
    settings = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    rope = save_tiny_llama(tmp_path, rope_parameters=settings).rope
    short, long = rope.scaled([1.0, 1e-4])
    assert short == 1.0
    assert long == pytest.approx(1e-4 / 8)
    # 2 pi / 0.25 is 2.5 turns of the original context: half-way between the two factors
    (between,) = rope.scaled([2.5 * 2 * np.pi / 64])
    assert between == pytest.approx(2.5 * 2 * np.pi / 64 * (0.5 + 0.5 / 8))


def serve(model: Llama, layout: str, policy: str, requests: list[Request], blocks: int) -> dict[int, list[int]]:
    """Serves all requests to their ends and returns their answers; each step takes its profile's time."""
    limits = Limits(rows=4, blocks=blocks, block_tokens=4, step_tokens=24)
    engine = Engine(reference_profile(), make_policy(policy), limits)
    executor = ModelExecutor(model, make_cache(layout, model, limits))
    answers: dict[int, list[int]] = {request.id: [] for request in requests}
    now_s, coming = 0.0, list(requests)
    while coming or engine.under_way:
        while coming and coming[0].arrival_s <= now_s:
            engine.submit(coming.pop(0), now_s)
        decision = engine.next_step(now_s)
        executor.drop(decision.drop)
        if decision.step is None:
            now_s = coming[0].arrival_s
            continue
        drawn = executor.run(decision.step)
        now_s += decision.step.predicted_s
        for event in engine.finished(decision.step, {id: Drawn(token) for id, token in drawn.items()}, now_s):
            if isinstance(event, Token):
                assert event.index == len(answers[event.life.id])
                answers[event.life.id].append(event.token)
    return answers


def requests(sampling: Sampling) -> list[Request]:
    rng = np.random.default_rng(3)
    sizes = [(30, 9), (3, 20), (17, 12), (1, 16), (9, 5), (22, 14)]
    return [
        Request(id, rng.integers(2, 300, prompt).tolist(), tokens, arrival_s=0.15 * id, sampling=sampling)
        for id, (prompt, tokens) in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def alone(tiny: tuple[Llama, Tensors, LlamaConfig]) -> dict[int, list[int]]:
    _, tensors, config = tiny
    return {each.id: plain_greedy(tensors, config, each.prompt, each.max_tokens) for each in requests(GREEDY)}


@pytest.mark.parametrize(
    ("layout", "policy", "blocks"),
    [
        ("slots", "fused", 64),
        ("paged", "fused", 16),
        ("padded", "fused", 16),
        ("padded", "baton", 64),
        ("paged", "orca", 16),
        ("paged", "srpt", 13),
        ("slots", "static", 64),
    ],
)
def test_answers_in_company_are_those_of_the_plain_forward_alone(
    layout: str, policy: str, blocks: int, tiny: tuple[Llama, Tensors, LlamaConfig], alone: dict[int, list[int]]
) -> None:
    assert serve(tiny[0], layout, policy, requests(GREEDY), blocks) == alone


def test_drawn_answers_do_not_depend_on_company_or_preemption(tiny: tuple[Llama, Tensors, LlamaConfig]) -> None:
    asked = requests(Sampling(temperature=0.8, top_p=0.9, seed=11))
    apart = {}
    for each in asked:
        apart |= serve(tiny[0], "slots", "fused", [each], 64)
    assert serve(tiny[0], "paged", "fused", asked, 14) == apart
    assert len({tuple(answer) for answer in apart.values()}) == len(asked)


def test_a_span_that_leaves_a_gap_is_refused(tiny: tuple[Llama, Tensors, LlamaConfig]) -> None:
    for layout in LAYOUTS:
        cache = make_cache(layout, tiny[0], LIMITS)
        with pytest.raises(ValueError, match="0 are stored"):
            cache.begin([Span(0, 0, 3, 1, (0,))])
    with pytest.raises(ValueError, match="no layout 'heap'"):
        make_cache("heap", tiny[0], LIMITS)
    with pytest.raises(ValueError, match="do not hold"):
        make_cache("paged", tiny[0], LIMITS).begin([Span(0, 0, 0, 5, (0,))])
