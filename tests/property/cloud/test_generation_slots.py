"""The slots of the KV cache: whatever comes, grows, leaves and comes back, each row attends to its own tokens alone."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.generation.model.kv import KVShape, Span
from isthmus.cloud.generation.model.slots import BLOCK, SlotCache

HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 4, 2
Stored = dict[int, list[tuple[np.ndarray, np.ndarray]]]
"""Of each request, the keys and values of all its tokens, (L, K, D) each."""


def plain(queries_HD: np.ndarray, seen: list[tuple[np.ndarray, np.ndarray]], layer: int) -> np.ndarray:
    """Attention of one token over these keys and values, head by head, in float64."""
    group, out = HEADS // KV_HEADS, []
    for head in range(HEADS):
        keys_TD = np.stack([keys[layer, head // group] for keys, _ in seen]).astype(np.float64)
        values_TD = np.stack([values[layer, head // group] for _, values in seen]).astype(np.float64)
        scores_T = keys_TD @ queries_HD[head] / np.sqrt(DIM)
        weights_T = np.exp(scores_T - scores_T.max())
        out.append(weights_T @ values_TD / weights_T.sum())
    return np.stack(out)


def step(cache: SlotCache, stored: Stored, counts: dict[int, int], rng: np.random.Generator) -> None:
    """Computes ``counts[id]`` further tokens of each request, and compares every row with the plain attention."""
    spans, start = [], 0
    for id, count in counts.items():
        spans.append(Span(id, start, cache.tokens(id), count))
        start += count
    cache.begin(spans)
    made = rng.normal(size=(LAYERS, start, HEADS + 2 * KV_HEADS, DIM)).astype(np.float32)
    keys, values = made[:, :, HEADS : HEADS + KV_HEADS], made[:, :, HEADS + KV_HEADS :]
    found = [
        cache.attend(layer, *(torch.from_numpy(each) for each in (made[layer, :, :HEADS], keys[layer], values[layer])))
        for layer in range(LAYERS)
    ]
    cache.end()
    for span in spans:
        for row in range(span.start, span.start + span.count):
            stored.setdefault(span.id, []).append((keys[:, row], values[:, row]))
            for layer in range(LAYERS):
                expected = plain(made[layer, row, :HEADS], stored[span.id], layer)
                np.testing.assert_allclose(found[layer][row], expected, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["come", "decode", "leave", "away"]), st.integers(1, 2 * BLOCK + 5)),
        min_size=3,
        max_size=12,
    ),
    st.integers(0, 99),
)
def test_every_row_attends_to_its_own_tokens_alone(acts: list[tuple[str, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = SlotCache(KVShape(LAYERS, KV_HEADS, DIM))
    stored: Stored = {}
    step(cache, stored, {0: 3 * BLOCK - 1, 1: 5}, rng)
    for at, (act, number) in enumerate(acts, start=2):
        ids = list(stored)
        some = ids[number % len(ids)] if ids else None
        if act == "come" or some is None:
            # A newcomer, half of the others decode, and one gets a further chunk.
            chunk = {some: 1 + number % 7} if some is not None else {}
            step(cache, stored, {**dict.fromkeys(ids[::2], 1), **chunk, at: number}, rng)
        elif act == "decode":
            for _ in range(3):
                step(cache, stored, dict.fromkeys(ids, 1), rng)
        elif act == "leave":
            cache.drop([some, 1_000])
            del stored[some]
        else:
            keys, values = cache.taken(some)
            assert cache.tokens(some) == 0
            for token, (own_keys, own_values) in enumerate(stored[some]):
                np.testing.assert_array_equal(keys[:, :, token], own_keys)
                np.testing.assert_array_equal(values[:, :, token], own_values)
            cache.place(some, (), keys, values)
    step(cache, stored, dict.fromkeys(stored, 1) or {at + 1: 1}, rng)
    largest = cache.bytes
    cache.drop(list(stored))
    assert cache.bytes <= largest // 2


def test_what_a_request_leaves_behind_reaches_nobody_else() -> None:
    rng = np.random.default_rng(0)
    cache = SlotCache(KVShape(LAYERS, KV_HEADS, DIM))
    stored: Stored = {}
    step(cache, stored, {0: BLOCK, 1: 3}, rng)
    endless = torch.full((LAYERS, KV_HEADS, 3 * BLOCK, DIM), torch.inf)
    cache.place(9, (), endless, -endless)
    cache.drop([9])
    # Rows of one and two blocks decode together, so a block of nobody is read too.
    for _ in range(2):
        step(cache, stored, {0: 1, 1: 1}, rng)
    step(cache, stored, {2: 2, 0: 1, 1: 1}, rng)
