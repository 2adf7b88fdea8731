"""Experts equal a plain evaluation of their definition: every token alone, every expert in full."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.experts import balance
from isthmus.cloud.elastic.experts.convert import converted
from isthmus.cloud.elastic.experts.layer import ExpertsMlp, Routing
from isthmus.cloud.elastic.experts.plan import chosen, padded, planned
from isthmus.cloud.elastic.model.timm_import import Mlp
from isthmus.cloud.elastic.scheduling.levels import fewer_of, gamma_of, level_of, levels, said
from isthmus.cloud.elastic.tasks.router import ExpertsShape, windows

WIDTH = 6


@st.composite
def cases(draw: st.DrawFn) -> tuple[ExpertsMlp, Tensor, Routing, list[tuple[int, int]]]:
    """A layer, tokens, routers of some tasks with windows."""
    experts = draw(st.integers(1, 7))
    k = draw(st.integers(1, experts))
    batch, tokens, tasks = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    layers = draw(st.integers(1, 2))
    layer = ExpertsMlp(layers - 1, WIDTH, 4, ExpertsShape(layers, experts, k)).eval()
    spans = []
    for _ in range(tasks):
        first = draw(st.integers(0, experts - 1))
        spans.append((first, draw(st.integers(1, experts - first))))
    bias_TME = torch.full((tasks, layers, experts), -math.inf)
    for task, (first, count) in enumerate(spans):
        bias_TME[task, :, first : first + count] = torch.randn(layers, count)
    # Some logits tie, so that the rule for ties is tested.
    weight_TMDE = torch.randn(tasks, layers, WIDTH, experts).round() if draw(st.booleans()) else torch.zeros(1)
    weight_TMDE = weight_TMDE.expand(tasks, layers, WIDTH, experts)
    tasks_B = torch.tensor([draw(st.integers(0, tasks - 1)) for _ in range(batch)]) if tasks > 1 else None
    least = draw(st.sampled_from((0.0, 0.1, 0.3)))
    return layer, torch.randn(batch, tokens, WIDTH), Routing(weight_TMDE, bias_TME, k, tasks_B, least), spans


def brute_force(layer: ExpertsMlp, tokens_BND: Tensor, routing: Routing) -> Tensor:
    """Computes the definition token by token, with every expert in full and a weight of 0 for those not chosen."""
    out_BND = torch.zeros_like(tokens_BND)
    for picture, tokens_ND in enumerate(tokens_BND):
        task = 0 if routing.tasks_B is None else int(routing.tasks_B[picture])
        for place, token_D in enumerate(tokens_ND):
            logits = [
                float(token_D @ routing.weight_TMDE[task, layer.layer, :, expert])
                + float(routing.bias_TME[task, layer.layer, expert])
                for expert in range(layer.shape.experts)
            ]
            shares = torch.tensor(logits).softmax(0).tolist()
            ranked = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))[: routing.k]
            for rank, expert in enumerate(ranked):
                if rank == 0 or shares[expert] >= max(routing.least, 1e-30):
                    out_BND[picture, place] += shares[expert] * layer.experts[expert](token_D[None])[0]
    return out_BND


@settings(deadline=None, max_examples=150)
@given(case=cases())
@torch.no_grad()
def test_every_order_of_computing_gives_what_the_definition_says(case: tuple) -> None:
    layer, tokens_BND, routing, _ = case
    wanted_BND = brute_force(layer, tokens_BND, routing)
    torch.testing.assert_close(layer(tokens_BND, routing), wanted_BND, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.token_by_token(tokens_BND, routing), wanted_BND, atol=1e-5, rtol=1e-5)
    with torch.enable_grad():  # training takes the same way without filling up rows
        torch.testing.assert_close(layer(tokens_BND, routing).detach(), wanted_BND, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=100)
@given(case=cases())
@torch.no_grad()
def test_a_picture_depends_neither_on_the_others_nor_on_experts_outside_its_window(case: tuple) -> None:
    layer, tokens_BND, routing, spans = case
    together_BND = layer(tokens_BND, routing)
    for picture in range(len(tokens_BND)):
        task = 0 if routing.tasks_B is None else int(routing.tasks_B[picture])
        alone = Routing(routing.weight_TMDE[task][None], routing.bias_TME[task][None], routing.k, None, routing.least)
        first, count = spans[task]
        spoilt = copy.deepcopy(layer)
        for expert in set(range(layer.shape.experts)) - set(range(first, first + count)):
            spoilt.experts[expert].fc2.bias.fill_(math.nan)  # even a weight of 0 would show it
        alone_BND = spoilt(tokens_BND[picture : picture + 1], alone)
        torch.testing.assert_close(alone_BND[0], together_BND[picture], atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 12),
    experts=st.integers(1, 8),
    data=st.data(),
    least=st.sampled_from((0.0, 0.05, 0.2)),
)
def test_a_plan_holds_each_pair_once_sorted_by_expert_then_row(
    rows: int, experts: int, data: st.DataObject, least: float
) -> None:
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    experts_NK, weights_NK = chosen(torch.randn(rows, experts), k)
    plan = planned(experts_NK, weights_NK, experts, least)
    wanted = sorted(
        (int(experts_NK[row, place]), row, float(weights_NK[row, place]))
        for row, place in itertools.product(range(rows), range(k))
        if place == 0 or weights_NK[row, place] >= least
    )
    made = [
        (expert, int(row), float(weight))
        for position, expert in enumerate(plan.experts)
        for row, weight in zip(*plan.of(position), strict=True)
    ]
    assert made == wanted
    assert len(set(plan.experts)) == len(plan.experts)
    if least == 0:
        assert len(made) == rows * k  # nothing is dropped for capacity


def test_of_equally_probable_experts_the_lower_number_comes_first() -> None:
    experts_NK, weights_NK = chosen(torch.zeros(3, 5), 3)
    assert experts_NK.tolist() == [[0, 1, 2]] * 3
    assert weights_NK.flatten().tolist() == pytest.approx([0.2] * 9)


@settings(deadline=None, max_examples=60)
@given(
    units=st.sampled_from((4, 8, 12)),
    parts=st.sampled_from((1, 2, 4)),
    copies=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_with_all_experts_alike_the_layer_is_the_dense_mlp(units: int, parts: int, copies: int, seed: int) -> None:
    torch.manual_seed(seed)
    mlp = Mlp(WIDTH, units).eval()
    experts = parts * copies
    layer = converted(mlp, 0, ExpertsShape(1, experts, experts), units // parts)
    uniform = Routing(torch.zeros(1, 1, WIDTH, experts), torch.zeros(1, 1, experts), experts)
    tokens_BND = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(layer(tokens_BND, uniform), mlp(tokens_BND), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9_999), experts=st.integers(2, 6), data=st.data())
def test_load_is_the_probability_of_being_among_the_largest(seed: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts - 1))
    torch.manual_seed(seed)
    deviation = 0.5
    clean_NE = torch.randn(3, experts, dtype=torch.float64)
    noisy_NE = clean_NE + deviation * torch.randn(3, experts, dtype=torch.float64)
    found_E = balance.load(clean_NE, noisy_NE, k, deviation)
    for expert in range(experts):
        wanted = 0.0
        for row in range(3):
            others = sorted((float(noisy_NE[row, each]) for each in range(experts) if each != expert), reverse=True)
            above = (float(clean_NE[row, expert]) - others[k - 1]) / deviation
            wanted += 0.5 * (1 + math.erf(above / math.sqrt(2)))
        assert float(found_E[expert]) == pytest.approx(wanted, abs=1e-9)


def test_load_without_noise_counts_and_importance_sums() -> None:
    experts_NK, weights_NK = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0.5, 0.25], [0.75, 0.125]])
    assert balance.importance(experts_NK, weights_NK, 4).tolist() == [1.25, 0.25, 0.125, 0.0]
    logits_NE = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 2.0, 1.0]])
    assert balance.load(logits_NE, logits_NE, 2, 0.0).tolist() == [2.0, 1.0, 1.0, 0.0]
    even_E, uneven_E = torch.ones(4), torch.tensor([4.0, 0.0, 0.0, 0.0])
    assert float(balance.loss(even_E, even_E)) == 0
    assert float(balance.squared_variation(uneven_E)) == pytest.approx(np.var([4, 0, 0, 0], ddof=1) / 1.0)
    assert float(balance.loss(uneven_E, even_E)) == pytest.approx(0.01 * 4.0)


def test_the_balance_has_a_gradient_towards_even_use() -> None:
    logits_NE = nn.Parameter(torch.tensor([[2.0, 0.0, 0.0]] * 8))
    experts_NK, weights_NK = chosen(logits_NE, 1)
    value = balance.loss(balance.importance(experts_NK, weights_NK, 3), balance.load(logits_NE, logits_NE, 1, 0.5))
    value.backward()
    assert logits_NE.grad is not None
    assert (logits_NE.grad[:, 0] > 0).all(), "a step against the gradient uses the busy expert less"


def test_load_of_a_window_ignores_the_experts_outside() -> None:
    clean_NE = torch.tensor([[1.0, 0.0, -math.inf, -math.inf]])
    found_E = balance.load(clean_NE, clean_NE, 1, 0.5)
    assert found_E.isfinite().all()
    assert found_E[2:].tolist() == [0.0, 0.0]
    whole_E = balance.load(clean_NE, clean_NE, 2, 0.5)  # both experts of the window are used, for certain
    assert whole_E.tolist() == [1.0, 1.0, 0.0, 0.0]


@given(gamma=st.integers(-1024, 1024), fewer=st.integers(0, 63))
def test_a_level_is_a_gamma_and_a_number_of_experts(gamma: int, fewer: int) -> None:
    if gamma > 0 and fewer:
        with pytest.raises(ValueError, match="usual experts"):
            level_of(gamma, fewer)
        return
    level = level_of(gamma, fewer)
    assert (gamma_of(level), fewer_of(level)) == (gamma, fewer)
    assert (level > 0) == (gamma > 0)


def test_levels_of_a_model() -> None:
    assert levels((-5, 0, 2), (), usual=0) == (-5, 0, 2)
    assert levels((-5, 0, 2), (1, 3), usual=3) == (-20005, -20000, -5, 0, 2)
    assert said(-20005, usual=3) == "-5, 1 expert"
    with pytest.raises(ValueError, match="no experts"):
        levels((0,), (1,), usual=0)
    with pytest.raises(ValueError, match="from 1 to 2 per token"):
        levels((0,), (3,), usual=2)


@given(tasks=st.integers(1, 9), experts=st.integers(1, 32), data=st.data())
def test_windows_never_pass_the_last_expert(tasks: int, experts: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, experts))
    starts = windows(tasks, experts, count)
    assert len(starts) == tasks and starts[0] == 0 and sorted(starts) == list(starts)
    assert all(start + count <= experts for start in starts)
    if tasks > 1:
        assert starts[-1] + count == experts


@given(rows=st.integers(1, 5_000))
def test_rows_are_filled_up_by_little_to_few_numbers(rows: int) -> None:
    assert rows <= padded(rows) <= rows + max(15, rows // 8)
    assert len({padded(each) for each in range(1, 5_000)}) < 120


def test_gelu_of_an_expert_is_exact() -> None:
    layer = ExpertsMlp(0, WIDTH, 4, ExpertsShape(1, 1, 1))
    expert = layer.experts[0]
    rows = torch.randn(5, WIDTH)
    torch.testing.assert_close(expert(rows), expert.fc2(functional.gelu(expert.fc1(rows))))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 9_999), experts=st.integers(1, 6), data=st.data())
def test_gradients_are_those_of_the_definition(seed: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    layer = ExpertsMlp(0, WIDTH, 4, ExpertsShape(1, experts, k))
    weight_TMDE = nn.Parameter(torch.randn(1, 1, WIDTH, experts))
    tokens_BND = nn.Parameter(torch.randn(2, 3, WIDTH))
    routing = Routing(weight_TMDE, torch.zeros(1, 1, experts), k)
    inputs = [weight_TMDE, tokens_BND, *layer.parameters()]
    found = torch.autograd.grad(layer(tokens_BND, routing).square().sum(), inputs, materialize_grads=True)
    shares_BNE = (tokens_BND @ weight_TMDE[0, 0]).softmax(-1)
    kept_BNE = torch.zeros_like(shares_BNE).scatter(-1, shares_BNE.topk(k, dim=-1).indices, 1.0)
    every_BNDE = torch.stack([expert(tokens_BND) for expert in layer.experts], dim=-1)
    plain_BND = (every_BNDE * (shares_BNE * kept_BNE)[..., None, :]).sum(-1)
    wanted = torch.autograd.grad(plain_BND.square().sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
