"""PURE: ensembles in weight space: the average of several models' weights ("soup") for one number (Prodigy, Alg. 5).

Prodigy's ensembler (chapter 4 of J. Chen's thesis, PolyU, 2025) profiles every tuned model at a number, normalises
these accuracies over the models, and averages the weights by them. The accuracies are close, so the result is nearly
the plain mean, and one bad model spoils it. Two sharper methods are added: a softmax of accuracy over a temperature,
which the profiling set chooses, and the greedy soup of Wortsman et al. (ICML 2022). A soup that profiles worse than its
best member alone is never kept.

The models have no batch normalisation, so no statistics must be recomputed for a soup.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

Shares = Mapping[str, float]
"""The weight of each model in a soup. They sum to 1. Models with weight 0 are left out."""

TEMPERATURES: Final = (0.02, 0.005)
"""Temperatures in units of accuracy: a model that is one temperature less accurate has about a third of the weight."""
SMALLEST_SHARE: Final = 1e-3
"""Smaller shares are dropped: they would cost a read of all weights for a negligible effect."""
CHUNK: Final = 1 << 18
"""Number of weights averaged at a time: 1 MiB of float32, which stays in the cache while all models are added."""


@dataclass(frozen=True)
class Soup:
    """The best soup for ``number``. ``method`` is normalised, softmax:T, greedy, or best (a single model)."""

    number: int
    shares: Shares
    accuracy: float
    method: str
    best_member: str
    best_accuracy: float

    @property
    def gain(self) -> float:
        """Its accuracy above the best single model, on the profiling set; never below 0."""
        return self.accuracy - self.best_accuracy


def normalised(accuracies: Mapping[str, float]) -> Shares:
    """Returns each accuracy over the sum of accuracies, as in the paper. Raises ValueError if none is above 0."""
    total = math.fsum(accuracies.values())
    if not total > 0 or min(accuracies.values()) < 0:
        raise ValueError(f"accuracies {dict(accuracies)} cannot be weights")
    return _kept({name: share / total for name, share in accuracies.items()})


def sharpened(accuracies: Mapping[str, float], temperature: float) -> Shares:
    """Returns softmax(accuracy / temperature). Raises ValueError for a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}")
    best = max(accuracies.values())
    powers = {name: math.exp((share - best) / temperature) for name, share in accuracies.items()}
    total = math.fsum(powers.values())
    return _kept({name: power / total for name, power in powers.items()})


def greedy(accuracies: Mapping[str, float], evaluate: Callable[[Shares], float]) -> tuple[Shares, float]:
    """Returns the greedy soup and its accuracy.

    Models are added to the plain average from the best on; each one stays unless it makes the soup worse.
    """
    ranked = sorted(accuracies, key=lambda name: (-accuracies[name], name))
    members, best = ranked[:1], accuracies[ranked[0]]
    for name in ranked[1:]:
        found = evaluate(_even([*members, name]))
        if found >= best:
            members, best = [*members, name], found
    return _even(members), best


def ensemble(
    number: int,
    accuracies: Mapping[str, float],
    evaluate: Callable[[Shares], float],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Soup:
    """Returns the best soup at ``number``, or the best model alone if no soup beats it.

    ``accuracies`` are those of the models at ``number`` on the profiling set. ``evaluate`` returns the accuracy there
    of the average with given shares; it is called once for each. Raises ValueError without models.
    """
    if not accuracies:
        raise ValueError("a soup needs at least one model")
    best_member = min(accuracies, key=lambda name: (-accuracies[name], name))
    best = Soup(number, {best_member: 1.0}, accuracies[best_member], "best", best_member, accuracies[best_member])
    if len(accuracies) == 1:
        return best
    asked: dict[tuple[tuple[str, float], ...], float] = {}

    def once(shares: Shares) -> float:
        key = tuple(sorted(shares.items()))
        if len(shares) == 1:
            return accuracies[next(iter(shares))]
        if key not in asked:
            asked[key] = evaluate(shares)
        return asked[key]

    tried: list[tuple[str, Shares]] = []
    if sum(accuracies.values()) > 0:
        tried.append(("normalised", normalised(accuracies)))
    tried += [(f"softmax:{temperature:g}", sharpened(accuracies, temperature)) for temperature in temperatures]
    found = [(once(shares), method, shares) for method, shares in tried]
    shares, share = greedy(accuracies, once)
    for accuracy, method, of in [*found, (share, "greedy", shares)]:
        if accuracy > best.accuracy:
            best = Soup(number, of, accuracy, method, best_member, accuracies[best_member])
    return best


@torch.no_grad()
def average(
    states: Mapping[str, Mapping[str, Tensor]], shares: Shares, *, into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Returns each tensor as the sum of share x tensor over the models. A tensor shared by all is not copied.

    ``into`` is an earlier average of the same shapes. Its memory is reused, since allocating memory costs more than the
    sum; memory of ``states`` is never overwritten. Every weight is read once and every average written once, in parts
    that stay in the cache. Raises ValueError for models whose tensors differ in name, shape or type, and for shares
    that do not sum to 1.
    """
    names = list(shares)
    if not names or abs(math.fsum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1, not {math.fsum(shares.values()):g}")
    first = states[names[0]]
    if len(names) == 1:
        return dict(first)
    mixed: dict[str, Tensor] = {}
    for key, tensor in first.items():
        members = [states[name].get(key) for name in names]
        if any(one is None or one.shape != tensor.shape or one.dtype != tensor.dtype for one in members) or any(
            states[name].keys() != first.keys() for name in names
        ):
            raise ValueError(f"models {', '.join(names)} cannot be averaged: {key} differs in shape or type")
        given = [one for one in members if one is not None]
        if all(one.data_ptr() == tensor.data_ptr() for one in given):
            mixed[key] = tensor
        else:
            out = None if into is None else into[key]
            if out is None or any(out.data_ptr() == state[key].data_ptr() for state in states.values()):
                out = torch.empty_like(tensor)
            mixed[key] = _mixed([one.contiguous() for one in given], [shares[name] for name in names], out)
    return mixed


def _mixed(tensors: Sequence[Tensor], shares: Sequence[float], out: Tensor) -> Tensor:
    parts = zip(out.view(-1).split(CHUNK), *(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True)
    for part, first, *others in parts:
        torch.mul(first, shares[0], out=part)
        for other, share in zip(others, shares[1:], strict=True):
            part.add_(other, alpha=share)
    return out


def _even(names: Sequence[str]) -> Shares:
    return {name: 1 / len(names) for name in names}


def _kept(shares: Shares) -> Shares:
    kept = {name: share for name, share in shares.items() if share >= SMALLEST_SHARE}
    total = math.fsum(kept.values())
    return {name: share / total for name, share in kept.items()}
