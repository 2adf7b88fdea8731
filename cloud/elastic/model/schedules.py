"""PURE: at which layers to merge. A schedule holds the change of token number at each layer, none above 0.

Shallow layers hold more tokens that are alike, and a token that goes early is saved by all layers behind it. The paper
tries four schedules for each gamma, in twelve layers; here they are scaled to any depth, and two that fall off
linearly stand beside them. Then single moves between layers are tried for as long as they gain (ours).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Schedule = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The best schedule, its accuracy, and that of changing by gamma at every layer."""

    schedule: Schedule
    accuracy: float
    uniform_accuracy: float
    tried: int


def candidates(gamma: int, depth: int, most: int) -> list[Schedule]:
    """The uniform schedule first, then those of the paper and ours; no layer loses more than ``most``.

    Raises ValueError for a gamma that is not below 0.

    The paper's for gamma -20 and 12 layers: 25 twice, 20 six times, then 0; 23 three times, 20 five times, then 0; 22
    four times, 20 four times, then 0. So: a sixth, a quarter and a third of the layers at 1.25, 1.15 and 1.1 of gamma,
    and none in the last third.
    """
    if not -most <= gamma < 0 or depth < 1:
        raise ValueError(f"a schedule is for a gamma from {-most} to -1, not {gamma}, and at least one layer")
    idle = depth // 3
    found = [(gamma,) * depth]
    for share, factor in ((1 / 6, 1.25), (1 / 4, 1.15), (1 / 3, 1.1)):
        eager = max(1, round(share * depth))
        found.append((round(factor * gamma),) * eager + (gamma,) * max(0, depth - eager - idle) + (0,) * idle)
    for idle in (0, depth // 3):
        falling = depth - idle
        found.append(
            tuple(round(2 * gamma * (falling - layer) / (falling + 1)) for layer in range(falling)) + (0,) * idle
        )
    return list(dict.fromkeys(tuple(max(-most, cut) for cut in schedule[:depth]) for schedule in found))


def search(
    gamma: int,
    depth: int,
    evaluate: Callable[[Schedule], float],
    operations: Callable[[Schedule], int],
    *,
    most: int,
    known: Mapping[Schedule, float] | None = None,
    max_evaluations: int = 40,
    slack: float = 0.02,
    on_evaluated: Callable[[Schedule, float], None] = lambda _schedule, _accuracy: None,
) -> Found:
    """The schedule of best accuracy among those that need at most (1 + slack) times the operations of the uniform one.

    ``evaluate`` measures accuracy on the profiling set, at most ``max_evaluations`` times, those in ``known`` (from an
    earlier, interrupted search) included. ``most``: tokens of the model. Of equal ones the first wins, so the uniform
    one is left only for a better one. Raises ValueError for a gamma or a number of evaluations that cannot be.
    """
    if max_evaluations < 1:
        raise ValueError("at least one schedule has to be evaluated")
    accuracies: dict[Schedule, float] = {}
    earlier = known or {}
    uniform = (gamma,) * depth
    budget = (1 + slack) * operations(uniform)

    def tried(schedule: Schedule) -> float:
        if schedule not in accuracies:
            accuracies[schedule] = earlier[schedule] if schedule in earlier else evaluate(schedule)
            on_evaluated(schedule, accuracies[schedule])
        return accuracies[schedule]

    best = uniform
    for schedule in candidates(gamma, depth, most):
        fits = operations(schedule) <= budget
        if fits and len(accuracies) < max_evaluations and tried(schedule) > tried(best):
            best = schedule
    step = max(1, -gamma // 4)
    while step:
        for schedule in _moves(best, step, most):
            if len(accuracies) >= max_evaluations:
                return Found(best, accuracies[best], accuracies[uniform], len(accuracies))
            if operations(schedule) <= budget and tried(schedule) > accuracies[best]:
                best = schedule
                break
        else:
            step //= 2
    return Found(best, accuracies[best], accuracies[uniform], len(accuracies))


def _moves(schedule: Schedule, step: int, most: int) -> Iterator[Schedule]:
    """``step`` merges moved from one layer to another."""
    for giver, given in enumerate(schedule):
        if given > -step:
            continue
        for taker in range(len(schedule)):
            if taker != giver and schedule[taker] - step >= -most:
                moved = list(schedule)
                moved[giver] += step
                moved[taker] -= step
                yield tuple(moved)
