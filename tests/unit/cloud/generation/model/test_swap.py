"""The pool beside the KV cache: what comes back is what went, only what is new is copied, and its room is bounded."""

from pathlib import Path

import pytest
import torch

from isthmus.cloud.generation.model import swap
from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import ModelExecutor, make_cache
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.slots import SlotCache
from isthmus.cloud.generation.model.swap import SwapPool
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.policies.lengths import KnownLengths
from isthmus.cloud.generation.policies.orders import Shortest
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Request, Sampling
from isthmus.cloud.generation.scheduling.step import Drawn, Ended
from tests.bench.generation.swapping import swapped_apart
from tests.rigs.generation.llama import save_tiny_llama


def tensors(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, 4, generator=random), torch.randn(2, 3, tokens, 4, generator=random)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_comes_back_is_what_went_and_only_the_rest_is_copied_again(tmp_path: Path, on_disk: bool) -> None:
    pool = SwapPool(20, folder=tmp_path if on_disk else None)
    keys, values = tensors(12)
    pool.put(1, keys[:, :, :8], values[:, :, :8])
    back = pool.take(1)
    assert torch.equal(back[0], keys[:, :, :8]) and torch.equal(back[1], values[:, :, :8])
    first = pool.copied_bytes
    pool.put(1, keys, values)
    back = pool.take(1)
    assert torch.equal(back[0], keys) and torch.equal(back[1], values)
    assert pool.copied_bytes == first + first // 2, "four further tokens after eight"
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_copies_of_those_who_came_back_make_room_and_the_others_never() -> None:
    pool = SwapPool(10)
    pool.put(1, *tensors(6))
    pool.take(1)
    pool.put(2, *tensors(8))
    assert pool.tokens == 8
    with pytest.raises(ValueError, match="no room for 3"):
        pool.put(3, *tensors(3))
    pool.drop([2, 9])
    assert pool.tokens <= 3
    pool.close()


def test_the_memory_of_dropped_requests_is_given_back_without_a_further_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    pool = SwapPool(20)
    monkeypatch.setattr(swap, "give_back", lambda: given.append(pool.tokens))
    pool.put(1, *tensors(8))
    pool.take(1)
    pool.put(2, *tensors(8, seed=1))
    pool.drop([7])
    pool.drop([1, 2])
    pool._thread.submit(lambda: None).result()  # all that was asked for before is done
    pool.close()
    assert given[-1] == 0, "after the last drop"


def test_a_slow_bus_holds_up_only_who_waits_for_it() -> None:
    slept: list[float] = []
    pool = SwapPool(10, bytes_per_s=1_000.0, sleep=slept.append)
    keys, values = tensors(2)
    pool.put(1, keys, values)
    assert torch.equal(pool.take(1)[0], keys)
    assert slept == [(keys.nbytes + values.nbytes) / 1_000]
    pool.close()


def test_the_resident_memory_of_the_cache_falls_if_the_pool_is_in_files(tmp_path: Path) -> None:
    full, less = swapped_apart(requests=8, tokens=512, away=6, folder=tmp_path)
    freed = full["cache_mb"] - less["cache_mb"]
    assert freed > 40 and full["anonymous_mb"] - less["anonymous_mb"] > 0.9 * freed
    assert less["mapped_mb"] - full["mapped_mb"] > 0.7 * 6 * 512 * 23_040 / 1e6, "it is in mapped files now"


def test_a_swapped_request_goes_on_without_computing_anything_again(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    model = load_llama(tmp_path / "model", LlamaConfig.read(tmp_path / "model"))
    lengths = {0: 30, 1: 3}
    requests = [
        Request(0, list(range(40, 140)), 30, 0.0, sampling=Sampling(temperature=0.0)),
        Request(1, list(range(90, 100)), 3, 0.5, sampling=Sampling(temperature=0.0)),
    ]
    cache_bytes: list[int] = []
    with_pool, facts = served(model, requests, lengths, swap_blocks=60, cache_bytes=cache_bytes)
    without, again = served(model, requests, lengths, swap_blocks=0, cache_bytes=[])
    assert with_pool == without
    assert facts == (1, 0) and again[0] == 0 and again[1] > 100
    assert min(cache_bytes) < max(cache_bytes) / 1.4, "while it is away, the cache holds nothing of it"


def served(
    model: Llama, requests: list[Request], lengths: dict[int, int], *, swap_blocks: int, cache_bytes: list[int]
) -> tuple[dict[int, list[int]], tuple[int, int]]:
    """Serves both with room for one at a time, the shorter one first. Returns answers, swaps and tokens again."""
    limits = Limits(rows=1, blocks=60, block_tokens=4, step_tokens=128, swap_blocks=swap_blocks)
    policy = Fused(Shortest("srpt", KnownLengths(lengths.__getitem__)), preempts=True)
    engine = Engine(reference_profile(), policy, limits, expires=False)
    cache = make_cache("slots", model, limits)
    pool = SwapPool(4 * swap_blocks) if swap_blocks else None
    executor = ModelExecutor(model, cache, pool)
    answers: dict[int, list[int]] = {}
    swaps, recomputed, now_s, coming = 0, 0, 0.0, list(requests)
    while coming or engine.under_way:
        while coming and coming[0].arrival_s <= now_s:
            engine.submit(coming.pop(0), now_s)
        decision = engine.next_step(now_s)
        executor.drop(decision.drop)
        assert decision.step is not None
        drawn = executor.run(decision.step)
        assert isinstance(cache, SlotCache)
        cache_bytes.append(cache.bytes)
        now_s += decision.step.predicted_s
        for event in engine.finished(decision.step, {id: Drawn(token) for id, token in drawn.items()}, now_s):
            if isinstance(event, Ended):
                answers[event.life.id] = event.life.tokens
                swaps += event.life.swapped
                recomputed += event.life.recomputed
    executor.close()
    assert engine.free_blocks == limits.blocks
    return answers, (swaps, recomputed)


def test_only_slots_can_be_swapped(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    model = load_llama(tmp_path / "model", LlamaConfig.read(tmp_path / "model"))
    with pytest.raises(ValueError, match="only the layout 'slots'"):
        ModelExecutor(model, make_cache("paged", model, Limits(blocks=4)), SwapPool(4))
