"""The int8 linear layer is compared with its arithmetic, written out."""

import copy

import pytest
import torch
from torch import nn

from isthmus.cloud.elastic.model.int8 import Int8Linear, padded


def reference(linear: nn.Linear, inputs_NK: torch.Tensor) -> torch.Tensor:
    """Weights to 127 steps on either side by channel, inputs to 63 by row; then a product in float64."""
    weight_CK = linear.weight.double()
    scale_C1 = weight_CK.abs().amax(dim=1, keepdim=True) / 127
    weight_CK = (weight_CK / scale_C1).round() * scale_C1
    step_N1 = inputs_NK.double().abs().amax(dim=1, keepdim=True) / 63
    bias_C = 0 if linear.bias is None else linear.bias.double()
    return (inputs_NK / step_N1).round() * step_N1 @ weight_CK.T + bias_C


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7, 5), (300, 5)])
def test_it_is_the_product_of_rounded_numbers(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 12, bias=bias).requires_grad_(False)
    inputs = torch.randn(shape) * 3 + 1
    expected = reference(linear, inputs.reshape(-1, 5)).reshape(*shape[:-1], 12)
    # One input may lie so near the middle of two steps that it is rounded the other way.
    step = float(inputs.abs().max()) / 63
    torch.testing.assert_close(Int8Linear(linear)(inputs).double(), expected, atol=step, rtol=1e-4)


def test_rounding_costs_about_a_hundredth() -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(192, 64).requires_grad_(False), torch.randn(50, 192)
    exact = linear(inputs)
    error = (Int8Linear(linear)(inputs) - exact).norm() / exact.norm()
    assert 0.001 < error < 0.03


def test_extremes_do_not_overflow() -> None:
    """Neighbouring products that all have the same sign and the largest size."""
    linear = nn.Linear(256, 3, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0], [-1.0], [0.5]]).expand(3, 256))
    outputs = Int8Linear(linear)(torch.full((2, 256), 10.0))
    torch.testing.assert_close(outputs, torch.tensor([[2560.0, -2560.0, 1280.0]]).expand(2, 3), rtol=0.01, atol=0)


def test_a_row_does_not_hang_on_the_others() -> None:
    torch.manual_seed(0)
    made, inputs = Int8Linear(nn.Linear(8, 12)), torch.randn(5, 8)
    huge = torch.cat((inputs, torch.full((1, 8), 1e6)))
    torch.testing.assert_close(made(huge)[:5], made(inputs), rtol=0, atol=0)


def test_rows_of_zeros_and_no_rows_at_all() -> None:
    made = Int8Linear(nn.Linear(4, 3))
    assert made.bias is not None
    torch.testing.assert_close(made(torch.zeros(2, 4)), made.bias.expand(2, 3))
    assert made(torch.zeros(1, 0, 4)).shape == (1, 0, 3)


def test_few_numbers_of_rows_do_for_all_batches() -> None:
    taken = [padded(rows) for rows in range(1, 5_000)]
    assert all(rows <= more for rows, more in enumerate(taken, start=1))
    assert taken == sorted(taken) and len(set(taken)) < 100
    assert all(more <= 1.25 * rows for rows, more in enumerate(taken, start=1) if rows > 64)


def test_some_channels_are_those_of_all() -> None:
    torch.manual_seed(0)
    made = Int8Linear(nn.Linear(8, 12))
    inputs = torch.randn(4, 8)
    torch.testing.assert_close(made.channels(inputs, 3, 9), made(inputs)[:, 3:9])


def test_a_channel_of_zeros_stays_zero() -> None:
    linear = nn.Linear(4, 2, bias=False).requires_grad_(False)
    linear.weight[1] = 0
    assert Int8Linear(linear)(torch.randn(3, 4))[:, 1].eq(0).all()


def test_its_weights_are_in_its_state() -> None:
    torch.manual_seed(0)
    one, other = Int8Linear(nn.Linear(4, 2)), Int8Linear(nn.Linear(4, 2))
    other.load_state_dict(one.state_dict())
    inputs = torch.randn(3, 4)
    torch.testing.assert_close(one(inputs), other(inputs))
    assert not torch.equal(copy.deepcopy(one.weight), Int8Linear(nn.Linear(4, 2)).weight)
