"""PURE: a token bucket, which bounds the rate of something and lets short bursts pass."""

from dataclasses import dataclass, field


@dataclass
class Bucket:
    """Up to ``rate_per_s`` per second, and ``burst`` at once. All times are in seconds of one clock.

    >>> bucket = Bucket(rate_per_s=10.0, burst=2.0)
    >>> [bucket.take(now_s) for now_s in (0.0, 0.0, 0.0, 0.1)]
    [0.0, 0.0, 0.1, 0.0]
    """

    rate_per_s: float
    burst: float
    _level: float = field(init=False)
    _at_s: float | None = None

    def __post_init__(self) -> None:
        self._level = self.burst

    def take(self, now_s: float, amount: float = 1.0) -> float:
        """Take ``amount`` if it is there. Returns 0.0, or the seconds until it will be; then nothing was taken.

        More than ``burst`` at once is let pass if the bucket is full, and the debt is paid before anything else passes.
        The result is infinite for a rate of 0.
        """
        if self._at_s is not None:
            self._level = min(self.burst, self._level + max(0.0, now_s - self._at_s) * self.rate_per_s)
        self._at_s = now_s if self._at_s is None else max(self._at_s, now_s)
        needed = min(amount, self.burst)
        # Sums of floats fall short of a whole by less than this.
        if self.rate_per_s > 0 and self._level >= needed - 1e-9:
            self._level -= amount
            return 0.0
        return (needed - self._level) / self.rate_per_s if self.rate_per_s > 0 else float("inf")
