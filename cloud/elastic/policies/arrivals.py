"""PURE: how many queries of each kind arrive a second, from those that came."""

import math


class ArrivalRate:
    """An average over the past with exponentially falling weight: half of it lies within 0.7 ``window_s``."""

    __slots__ = ("_last_s", "_rate_per_s", "window_s")

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._rate_per_s = 0.0
        self._last_s = -math.inf

    def add(self, at_s: float) -> None:
        """One arrival. One that lies before the last counts as if it came with it."""
        self._rate_per_s = self.at(at_s) + 1 / self.window_s
        self._last_s = max(self._last_s, at_s)

    def at(self, now_s: float) -> float:
        """Arrivals a second as of ``now_s``."""
        return self._rate_per_s * math.exp(min(0.0, self._last_s - now_s) / self.window_s)
