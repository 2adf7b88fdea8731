"""The packed linear layer is compared with the layer that it replaces."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from isthmus.cloud.elastic.model.packed import FEWEST_ROWS, PackedLinear


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (2, 24), (3, 7, 24), (512, 24), (513, 24), (2, 300, 24)])
@torch.inference_mode()
def test_it_is_the_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain = linear(bias)
    packed, inputs = PackedLinear(plain), torch.randn(shape)
    torch.testing.assert_close(packed(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.channels(inputs, 8, 20), plain(inputs)[..., 8:20], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.with_gelu(inputs), functional.gelu(plain(inputs)), rtol=1e-5, atol=1e-5)
    rows = inputs.numel() // 24
    assert {key[1:] for key in packed._packed} == ({(0, 40, 0, 24), (8, 20, 0, 24)} if rows >= FEWEST_ROWS else set())
    assert packed.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (4, 24), (3, 7, 24), (600, 24)])
@torch.inference_mode()
def test_long_sums_in_pieces_are_the_same_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain = linear(bias)
    packed, inputs = PackedLinear(plain, most_summed=10), torch.randn(shape)
    torch.testing.assert_close(packed(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.with_gelu(inputs), functional.gelu(plain(inputs)), rtol=1e-5, atol=1e-5)
    in_pieces = {key[1:] for key in packed._packed if key[3]}
    assert in_pieces == ({(0, 40, 10, 20), (0, 40, 20, 24)} if inputs.numel() // 24 >= FEWEST_ROWS else set())


@torch.inference_mode()
def test_sums_in_pieces_are_nearer_to_the_exact_ones() -> None:
    torch.manual_seed(0)
    plain, inputs = nn.Linear(6_144, 32, bias=False), torch.randn(64, 6_144)
    exact = functional.linear(inputs.double(), plain.weight.double())
    whole, pieces = (PackedLinear(plain, most_summed=most) for most in (None, 768))
    errors = [float((each(inputs).double() - exact).square().mean()) for each in (whole, pieces)]
    assert errors[1] < errors[0]
    brain = plain.to(torch.bfloat16)
    whole, pieces = (PackedLinear(brain, most_summed=most) for most in (None, 768))
    assert torch.equal(whole(inputs.bfloat16()), pieces(inputs.bfloat16())), "each piece would be rounded"


@torch.inference_mode()
def test_inputs_that_do_not_lie_in_order() -> None:
    plain, inputs = linear(), torch.randn(24, 5, 3).permute(2, 1, 0)
    torch.testing.assert_close(PackedLinear(plain)(inputs), plain(inputs), rtol=1e-5, atol=1e-5)


def test_where_gradients_are_wanted_they_come() -> None:
    plain = linear()
    packed, inputs = PackedLinear(plain), torch.randn(5, 24, requires_grad=True)
    packed(inputs).square().sum().backward()
    got = inputs.grad
    inputs.grad = None
    plain(inputs).square().sum().backward()
    assert got is not None and inputs.grad is not None
    assert torch.equal(got, inputs.grad)
    assert not packed._packed


@pytest.mark.parametrize("rows", [1, 5, 600])
@torch.inference_mode()
def test_in_bfloat16_it_is_that_layer(rows: int) -> None:
    plain, inputs = linear(), torch.randn(rows, 24)
    packed = PackedLinear(plain)
    packed(inputs)  # weights packed in float32 are not used for another number type
    packed.to(torch.bfloat16)
    few, exact = inputs.bfloat16(), linear()
    for answer, wanted in (
        (packed(few), exact(few.float())),
        (packed.with_gelu(few), functional.gelu(exact(few.float()))),
    ):
        assert answer.dtype == torch.bfloat16
        torch.testing.assert_close(answer.float(), wanted, rtol=2e-2, atol=2e-2)
