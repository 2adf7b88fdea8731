"""PURE: searches at which layers to merge. A schedule holds the change of the token number at each layer, none above 0.

Shallow layers hold more similar tokens, and a token removed early saves work in all later layers. OTAS tries four
schedules per gamma, for twelve layers. Here they are scaled to any depth, and two linearly falling schedules are added.
Then single moves between layers are tried as long as they improve accuracy. The additions are ours.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Schedule = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The best schedule, its accuracy, the accuracy of the uniform schedule, and the number of schedules tried."""

    schedule: Schedule
    accuracy: float
    uniform_accuracy: float
    tried: int


def candidates(gamma: int, depth: int, most: int) -> list[Schedule]:
    """Returns the uniform schedule, then the paper's, then ours. No layer loses more than ``most`` tokens.

    Raises ValueError for a gamma that is not below 0.

    The paper's schedules for gamma -20 and 12 layers: 25 twice, 20 six times, then 0; 23 three times, 20 five times,
    then 0; 22 four times, 20 four times, then 0. That is 1.25, 1.15 and 1.1 times gamma in a sixth, a quarter and a
    third of the layers, and nothing in the last third.
    """
    if not -most <= gamma < 0 or depth < 1:
        raise ValueError(f"a schedule needs a gamma from {-most} to -1, not {gamma}, and at least one layer")
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
    """Returns the most accurate schedule with at most (1 + ``slack``) times the operations of the uniform schedule.

    ``evaluate`` measures accuracy on the profiling set. At most ``max_evaluations`` schedules are evaluated, including
    those in ``known`` (from an earlier, interrupted search). ``most`` is the number of tokens of the model. The first
    of equally accurate schedules wins, so only a better schedule replaces the uniform one.
    Raises ValueError for a gamma that is not below 0, or fewer than one evaluation.
    """
    if max_evaluations < 1:
        raise ValueError("at least one schedule must be evaluated")
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
    """Yields the schedules in which ``step`` merges are moved from one layer to another."""
    for giver, given in enumerate(schedule):
        if given > -step:
            continue
        for taker in range(len(schedule)):
            if taker != giver and schedule[taker] - step >= -most:
                moved = list(schedule)
                moved[giver] += step
                moved[taker] -= step
                yield tuple(moved)
