"""The forward in float32 against a plain one in float64: all layouts of the KV cache, ragged steps, every option."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import ModelExecutor, make_cache
from isthmus.cloud.generation.model.kv import LAYOUTS, KVShape, Span
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.paged import PagedCache
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Request, Sampling
from isthmus.cloud.generation.scheduling.step import Drawn, Token
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


def test_requests_that_begin_alike_share_blocks_and_draw_what_each_draws_alone(tmp_path: Path) -> None:
    """Chunks, a preemption's worth of blocks and company: the tokens are those of the plain forward of each alone."""
    config = save_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = load_llama(tmp_path, config)
    limits = Limits(rows=3, blocks=24, block_tokens=4, prefix_blocks=12)
    engine = Engine(reference_profile(), Fused(chunk_tokens=16), limits)
    executor = ModelExecutor(model, make_cache("paged", model, limits))
    system = [9, 30, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    prompts = {id: [*system[: 11 - id % 3], 40 + id, 50, 60 + id] for id in range(8)}
    prompts[8] = prompts[0]
    answers: dict[int, list[int]] = {id: [] for id in prompts}
    for id, prompt in prompts.items():
        engine.submit(Request(id, prompt, 6, arrival_s=0.0, sampling=Sampling(temperature=0.0)), 0.0)
    now_s, copies = 0.0, 0
    while engine.under_way:
        decision = engine.next_step(now_s)
        executor.drop(decision.drop)
        step = decision.step
        assert step is not None
        now_s += step.predicted_s
        copies += sum(shared.copy is not None for _, shared in step.shared)
        for event in engine.finished(step, {id: Drawn(token) for id, token in executor.run(step).items()}, now_s):
            if isinstance(event, Token):
                answers[event.life.id].append(event.token)
    assert answers == {id: plain_greedy(tensors, config, prompt, 6) for id, prompt in prompts.items()}
    assert engine.shared_tokens > 30 and copies > 2


def test_logits_after_shared_blocks_are_those_of_the_whole_prompt(tmp_path: Path) -> None:
    config = save_tiny_llama(tmp_path)
    model = load_llama(tmp_path, config)
    limits = Limits(rows=2, blocks=8, block_tokens=4)
    cache = PagedCache(KVShape(config.layers, config.kv_heads, config.head_dim), limits.blocks, limits.block_tokens)

    def logits(ids: list[int], first: int, id: int, blocks: tuple[int, ...]) -> torch.Tensor:
        cache.begin([Span(id, 0, first, len(ids) - first, blocks)])
        positions = torch.arange(first, len(ids))
        found: torch.Tensor = model(torch.tensor(ids[first:]), positions, torch.tensor([len(ids) - first - 1]), cache)
        cache.end()
        return found

    first, second = [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 10, 30, 31]
    logits(first, 0, 0, (3, 1))
    cache.copy(1, 6)
    cache.begin_shared(1, 6)
    shared = logits(second, 6, 1, (3, 6))
    torch.testing.assert_close(shared, logits(second, 0, 2, (4, 5)), atol=1e-4, rtol=0)
    again = logits([*first, 12], 7, 0, (3, 1))
    torch.testing.assert_close(again, logits([*first, 12], 0, 3, (0, 7)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="has 8 tokens in the cache already"):
        cache.begin_shared(0, 4)
