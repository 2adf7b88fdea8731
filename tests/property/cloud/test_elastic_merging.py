"""Merging against a slow, plain reference; and what must hold of any merge."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from isthmus.cloud.elastic.model.merging import match, merge, mergeable, proportional_mask
from isthmus.cloud.elastic.scheduling.merge_order import MERGE_ORDERS, MergeOrder

Sample = tuple[Tensor, Tensor, Tensor, int, int]
ORDERS = st.sampled_from(MERGE_ORDERS)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Tokens, keys and sizes of a batch, how many to merge, how many are protected."""
    protected = draw(st.integers(0, 3))
    tokens = draw(st.integers(protected + 2, 24))
    count = draw(st.integers(1, (tokens - protected) // 2))
    batch, width = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens_BND = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    keys_BND = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    sizes_BN = torch.randint(1, 5, (batch, tokens), generator=generator).float()
    return tokens_BND, keys_BND, sizes_BN, count, protected


def reference(
    tokens_ND: Tensor, keys_ND: Tensor, sizes_N: Tensor, count: int, protected: int, order: MergeOrder
) -> list[list[float]]:
    """One sample, token by token: each row is (size, token...), in the order of ``merge``."""

    def cosine(one: int, other: int) -> float:
        a, b = keys_ND[one].tolist(), keys_ND[other].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    free = list(range(protected, len(tokens_ND)))
    if order == "published":  # as in the paper's code: even positions give, odd ones receive
        receiving, others = ([index for index in free if index % 2 == odd] for odd in (1, 0))
    else:
        receiving, others = free[0::2], free[1::2]
    nearest = {other: max(receiving, key=lambda to: cosine(other, to)) for other in others}
    going = sorted(others, key=lambda other: -cosine(other, nearest[other]))[:count]
    groups = [[index] for index in range(protected)]
    merged = [[to, *(other for other in going if nearest[other] == to)] for to in receiving]
    staying = [[other] for other in others if other not in going]
    groups += staying + merged if order == "published" else merged + staying
    rows = []
    for group in groups:
        size = sum(float(sizes_N[index]) for index in group)
        mean = sum(float(sizes_N[index]) * tokens_ND[index] for index in group) / size
        assert isinstance(mean, Tensor)
        rows.append([size, *mean.tolist()])
    return rows


@given(samples(), ORDERS)
def test_equals_the_slow_reference(sample: Sample, order: MergeOrder) -> None:
    tokens_BND, keys_BND, sizes_BN, count, protected = sample
    merged_BND, new_sizes_BN = merge(tokens_BND, sizes_BN, match(keys_BND, count, protected, order))
    for b in range(len(tokens_BND)):
        expected = torch.tensor(
            reference(tokens_BND[b], keys_BND[b], sizes_BN[b], count, protected, order), dtype=torch.float64
        )
        assert torch.equal(new_sizes_BN[b].double(), expected[:, 0])
        torch.testing.assert_close(merged_BND[b], expected[:, 1:], rtol=0, atol=1e-6)  # shares are float32


@given(samples(), ORDERS)
def test_conserves_mass_and_keeps_the_protected(sample: Sample, order: MergeOrder) -> None:
    tokens_BND, keys_BND, sizes_BN, count, protected = sample
    merged_BND, new_sizes_BN = merge(tokens_BND, sizes_BN, match(keys_BND, count, protected, order))
    assert merged_BND.shape == (len(tokens_BND), tokens_BND.shape[1] - count, tokens_BND.shape[2])
    assert torch.equal(new_sizes_BN.sum(1), sizes_BN.sum(1))
    mass_BD, new_mass_BD = (
        (sizes[..., None] * tokens).sum(1) for sizes, tokens in ((sizes_BN, tokens_BND), (new_sizes_BN, merged_BND))
    )
    torch.testing.assert_close(new_mass_BD, mass_BD, rtol=0, atol=1e-5)
    assert torch.equal(merged_BND[:, :protected], tokens_BND[:, :protected])
    assert torch.equal(new_sizes_BN[:, :protected], sizes_BN[:, :protected])


@given(samples())
def test_without_sizes_every_token_counts_once(sample: Sample) -> None:
    tokens_BND, keys_BND, sizes_BN, count, protected = sample
    matching = match(keys_BND, count, protected)
    merged_BND, new_sizes_BN = merge(tokens_BND, None, matching)
    same_BND, same_BN = merge(tokens_BND, torch.ones_like(sizes_BN), matching)
    assert torch.equal(merged_BND, same_BND) and torch.equal(new_sizes_BN, same_BN)


@given(samples())
def test_merging_copies_into_sized_tokens_leaves_attention_as_it_was(sample: Sample) -> None:
    """Proportional attention over tokens with sizes equals plain attention over as many copies of each."""
    values_BND, keys_BND, sizes_BN, _, _ = sample
    queries_BND = values_BND.flip(1)
    for b in range(len(keys_BND)):
        sizes_N = sizes_BN[b].long()
        one_B = slice(b, b + 1)
        sized = functional.scaled_dot_product_attention(
            queries_BND[one_B, None],
            keys_BND[one_B, None],
            values_BND[one_B, None],
            attn_mask=proportional_mask(sizes_BN[one_B], torch.float64),
        )
        copied = functional.scaled_dot_product_attention(
            queries_BND[one_B, None],
            keys_BND[one_B].repeat_interleave(sizes_N, dim=1)[:, None],
            values_BND[one_B].repeat_interleave(sizes_N, dim=1)[:, None],
        )
        torch.testing.assert_close(sized, copied, rtol=0, atol=1e-6)  # logs of sizes are float32


@given(tokens=st.integers(1, 300), wanted=st.integers(0, 400), protected=st.integers(1, 3))
def test_at_most_half_goes_and_one_stays_beside_the_class_token(tokens: int, wanted: int, protected: int) -> None:
    count = mergeable(tokens, wanted, protected)
    assert 0 <= count <= wanted
    assert 2 * count <= max(0, tokens - protected)
    assert count == 0 or tokens - count >= protected + 1
    if tokens - protected >= 2 * wanted:
        assert count == wanted


@pytest.mark.parametrize("count", [0, -1, 3])
def test_a_count_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        match(torch.ones(1, 6, 2), count)


def test_gradients_flow_through_a_merge() -> None:
    tokens_BND = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    merged_BND, sizes_BN = merge(tokens_BND, None, match(torch.randn(2, 9, 4), 3))
    (merged_BND * sizes_BN[..., None]).sum().backward()
    assert tokens_BND.grad is not None
    torch.testing.assert_close(tokens_BND.grad, torch.ones_like(tokens_BND), rtol=0, atol=1e-6)
