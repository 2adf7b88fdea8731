"""PURE: how many executors a load needs: up on the present, down on the maximum of a window.

An executor takes long to start, so a number that swings costs more than it saves. Elastic serving bridges the seconds
until an executor is there by removing tokens.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Final

from isthmus.cloud.elastic.scheduling.profile import Profile

SMOOTHED_S: Final = 3.0
"""Seconds after which the weight of an earlier measurement has fallen to 1/e. Arrivals within a second vary."""
MOST_PATIENCE: Final = 8.0
"""The wait for a removal grows to at most this many windows."""


@dataclass(frozen=True)
class ScaleRule:
    """Between ``least`` and ``most`` executors, each busy for at most ``target`` of the time.

    Images that wait are to be answered within ``drain_s``. An executor is removed if at no time of the last
    ``window_s`` the others would have been busy for more than ``target_after`` of the time: less than ``target``, so
    that arrivals that vary by chance do not bring it back. Raises ValueError for numbers that make no sense.
    """

    least: int = 1
    most: int = 1
    target: float = 0.8
    target_after: float = 0.6
    drain_s: float = 5.0
    window_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"from {self.least} to {self.most} executors: least is at least 1, and most not below it")
        if not 0 < self.target_after <= self.target <= 1:
            raise ValueError(f"target {self.target}, target_after {self.target_after}: shares, the second not above")
        if not (self.drain_s > 0 and self.window_s >= 0):
            raise ValueError(f"drain_s {self.drain_s}, window_s {self.window_s}: out of range")


@dataclass(frozen=True, slots=True)
class Load:
    """Work of an interval, in seconds of one executor with all tokens: what ``arrived``, and what still ``waits``."""

    arrived_s: float
    waits_s: float


@dataclass(frozen=True)
class Scale:
    """How many executors are wanted, and what was seen so far. ``Scale.begin`` makes the first one."""

    executors: int
    at_s: float
    offered: float = 0.0
    """Executors that would be busy all the time with what arrives; smoothed."""
    needs: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    """(time, executors to keep) of the window: the ones that no later one exceeds, so the first is the maximum."""
    removed_s: float = -math.inf
    """Time of the last removal."""
    patience: float = 1.0
    """Windows that a removal waits. Doubled when a removal had to be taken back within a window."""

    @staticmethod
    def begin(rule: ScaleRule, now_s: float) -> "Scale":
        """Returns the state at the start, with the fewest executors."""
        return Scale(rule.least, now_s, needs=((now_s, rule.least),))


def scaled(rule: ScaleRule, state: Scale, load: Load, now_s: float) -> Scale:
    """Returns the next state, from the load since ``state.at_s``. Call it about once per second.

    Executors are added at once, as many as the present load needs. They are removed one window after the last time that
    they were needed, down to the maximum of that window. So a removal never follows an addition within a window. A
    removal that turns out wrong is taken back at once. The next one then waits twice as long, up to ``MOST_PATIENCE``
    windows; an addition long after the last removal halves the wait again.

    A clock that stands or goes back changes nothing.

    >>> rule = ScaleRule(most=4)
    >>> scaled(rule, Scale.begin(rule, 0.0), Load(arrived_s=2.4, waits_s=1.0), 1.0).executors
    2
    """
    past_s = now_s - state.at_s
    if past_s <= 0:
        return state
    kept = math.exp(-past_s / SMOOTHED_S)
    offered = kept * state.offered + (1 - kept) * load.arrived_s / past_s
    busy = offered + load.waits_s / rule.drain_s
    # Rounding must not make one executor of none.
    needed, kept_on = (
        min(rule.most, max(rule.least, math.ceil(busy / target - 1e-9))) for target in (rule.target, rule.target_after)
    )
    seen = replace(state, at_s=now_s, offered=offered, needs=_noted(state, kept_on, now_s, rule.window_s))
    if needed > state.executors:
        wrong = now_s - state.removed_s <= rule.window_s
        patience = min(MOST_PATIENCE, 2 * state.patience) if wrong else max(1.0, state.patience / 2)
        return replace(seen, executors=needed, patience=patience)
    most_kept = seen.needs[0][1]
    if most_kept < state.executors:
        return replace(seen, executors=most_kept, removed_s=now_s)
    return seen


def _noted(state: Scale, needed: int, now_s: float, window_s: float) -> tuple[tuple[float, int], ...]:
    """Returns the window's maxima with a new one. A level counts until it was not reached for the whole wait."""
    since_s = now_s - window_s * state.patience
    larger = tuple((at_s, number) for at_s, number in state.needs if number > needed and at_s >= since_s)
    return (*larger, (now_s, needed))


class Scaler:
    """Asks the rule again and again, from running totals. It has no clock of its own and does not start anything."""

    def __init__(self, rule: ScaleRule, profile: Profile, now_s: float) -> None:
        self.rule = rule
        self._image_s = full_image_s(profile)
        self._state = Scale.begin(rule, now_s)
        self._arrived = 0

    @property
    def wanted(self) -> int:
        """The number of executors that is wanted now."""
        return self._state.executors

    def look(self, arrived: int, waiting: int, now_s: float, pace: float = 1.0) -> int:
        """Returns the number of executors wanted from now on.

        ``arrived`` counts all images so far, also those that were refused. ``pace`` is the time of a batch as a
        multiple of what the profile says.
        """
        load = Load((arrived - self._arrived) * self._image_s * pace, waiting * self._image_s * pace)
        if now_s > self._state.at_s:
            self._arrived = arrived
        self._state = scaled(self.rule, self._state, load, now_s)
        return self.wanted


def full_image_s(profile: Profile) -> float:
    """Returns the seconds of an executor per image with all tokens, or at the slowest gamma if 0 was not measured."""
    return 1 / (profile.capacity_per_s(0) if 0 in profile.gammas else min(map(profile.capacity_per_s, profile.gammas)))
