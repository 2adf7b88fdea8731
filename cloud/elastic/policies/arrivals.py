"""PURE: estimates how many queries arrive per second from the arrivals so far."""

import math


class ArrivalRate:
    """Arrival rate, averaged with exponentially decaying weights. The last 0.7 ``window_s`` have half of the weight."""

    __slots__ = ("_last_s", "_rate_per_s", "window_s")

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._rate_per_s = 0.0
        self._last_s = -math.inf

    def add(self, at_s: float) -> None:
        """Counts one arrival. An arrival earlier than the last one counts as if both were simultaneous."""
        self._rate_per_s = self.at(at_s) + 1 / self.window_s
        self._last_s = max(self._last_s, at_s)

    def average_over(self, window_s: float, now_s: float) -> None:
        """Averages over ``window_s`` from ``now_s`` on. The rate of now stays as it is."""
        if window_s != self.window_s:
            self._rate_per_s, self._last_s = self.at(now_s), max(self._last_s, now_s)
            self.window_s = window_s

    def at(self, now_s: float) -> float:
        """Returns the arrivals per second as of ``now_s``."""
        return self._rate_per_s * math.exp(min(0.0, self._last_s - now_s) / self.window_s)
