"""The two ways of attention are compared with each other, and the choice between them is tested with a false clock."""

import itertools
import statistics

import pytest
import torch
from torch import Tensor

from isthmus.cloud.elastic.model import attention
from isthmus.cloud.elastic.model.attention import FEW_TOKENS, fastest_mixing, mixed
from isthmus.cloud.elastic.model.packed import PackedLinear
from tests.rigs.elastic.vit import images, tiny


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(5, tokens, 3, 4, 16).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return queries, keys, values


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
@pytest.mark.parametrize("asking", [1, 41])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.inference_mode()
def test_both_ways_are_attention(
    dtype: torch.dtype, apart: float, masked: bool, asking: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys, values = inputs(41, dtype)
    mask = torch.rand(5, 1, 1, 41).to(dtype) if masked else None
    logits = (queries.float() @ keys.float().mT)[:, :, :asking] / 4
    weights = torch.softmax(logits if mask is None else logits + mask.float(), dim=-1)
    exact = (weights @ values.float()).transpose(1, 2).flatten(2)
    monkeypatch.setattr(attention, "LOGITS_BYTES", at_a_time * 4 * asking * 41 * queries.element_size())
    for mixing in ("fused", "products"):
        found = mixed(queries[:, :, :asking], keys, values, mask, mixing)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, rtol=apart, atol=apart)


@torch.inference_mode()
def test_few_tokens_and_gradients_take_the_fused_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention, "_by_products")
    few = inputs(FEW_TOKENS - 1, torch.float32)
    assert torch.equal(mixed(*few, None, "products"), mixed(*few, None, "fused"))
    with torch.inference_mode(False), torch.enable_grad():
        many = inputs(FEW_TOKENS, torch.float32)
        assert mixed(*many, None, "products").shape == (5, FEW_TOKENS, 64)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs bfloat16 products in oneDNN")
@pytest.mark.parametrize(("took_s", "wanted"), [((1.0, 2.0), "fused"), ((2.0, 1.0), "products")])
def test_the_faster_way_is_chosen(took_s: tuple[float, float], wanted: str) -> None:
    """The clock is read before and after each way, in turn."""
    steps = itertools.chain.from_iterable(((0.0, took_s[0], 0.0, took_s[1])) for _ in itertools.count())
    reads = itertools.chain((0.0, 0.0), steps)  # the first round only reads the clock at its begin
    assert fastest_mixing(2, 8, 33, torch.bfloat16, batch=1, clock=lambda: next(reads)) == wanted


def test_other_number_types_are_not_measured() -> None:
    assert fastest_mixing(2, 8, 33, torch.float32, clock=lambda: pytest.fail("the clock was read")) == "fused"


@torch.inference_mode()
@pytest.mark.parametrize("gamma", [0, -2])
def test_a_model_answers_alike_by_both_ways(gamma: int) -> None:
    """Of several pictures the median counts: where two pairs of tokens are as similar, rounding may merge the other."""
    model = tiny()
    pictures = images(24).split(2)
    exact = [model.features(some, gamma) for some in pictures]
    model.to(torch.bfloat16)
    model.remake_linears(PackedLinear)
    apart: dict[str, float] = {}
    for mixing in ("fused", "products"):
        model.mixing = mixing
        found = [model.features(some.bfloat16(), gamma).float() for some in pictures]
        apart[mixing] = statistics.median(
            float((one - other).square().mean().sqrt()) for one, other in zip(found, exact, strict=True)
        )
    assert apart["products"] < 1.5 * apart["fused"], "the products lose no more than bfloat16 itself"
