"""What is counted while requests for text are answered, by a model of ours or by others: outcomes, tokens and times."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final

from isthmus.cloud.generation.scheduling.request import Outcome
from isthmus.cloud.histogram import Histogram

TIMES: Final = ("queue", "first_token", "per_token", "request", "pause")


@dataclass
class Numbers:
    """Counts since the start, and the load now.

    ``times``: of whole answers, in seconds: in the queue, to the first token, per later token, in all; and how long
    requests that were moved were at no replica.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    moves: Counter[str] = field(default_factory=Counter)
    """Requests moved between replicas: by their "blocks", or their "tokens" alone, and "failed" ones, which stayed."""
    tokens: int = 0
    """Tokens drawn."""
    shared_tokens: int = 0
    """Tokens of prompts that were not computed, because another request that begins alike had."""
    under_way: int = 0
    waiting: int = 0
    """Requests under way that have no place in the KV cache, or at a replica."""
    free_blocks: int = 0
    kept_blocks: int = 0
    """Free blocks that hold the beginning of a prompt."""
    times: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in TIMES})

    def note(self, queue_s: float, ttft_s: float, total_s: float, tokens: int) -> None:
        """Counts the times of a whole answer of so many tokens."""
        for name, seconds in (("queue", queue_s), ("first_token", ttft_s), ("request", total_s)):
            self.times[name].note(seconds)
        if tokens > 1:
            self.times["per_token"].note((total_s - ttft_s) / (tokens - 1))

    def copy(self) -> "Numbers":
        """Returns a copy that later requests do not change."""
        times = {name: seen.copy() for name, seen in self.times.items()}
        return replace(self, outcomes=Counter(self.outcomes), moves=Counter(self.moves), times=times)
