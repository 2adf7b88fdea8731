"""PURE: which of several replicas of a model gets the next request, and what moves between them (Sun et al. 2024,
"Llumnix", sec. 4.4).

Freeness of a replica: F = (M - sum of V) / B, with M its blocks, V the blocks that each of its requests uses, and B the
number of rows that decode. The head of a replica's queue counts the blocks it waits for; the others behind it count
nothing. A replica that is drained is as full as can be, so everything moves away from it.

Where we differ: no headroom for requests of high priority, since requests have deadlines here instead of priorities.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isthmus.cloud.generation.scheduling.profile import GenerationProfile


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a replica. ``used`` blocks are owned; ``head_blocks`` are those that its queue's head waits for.

    >>> Standing(0, blocks=100, used=20, rows=4).freeness, Standing(1, 100, 0, 0, draining=True).freeness
    (20.0, -inf)
    """

    id: int
    blocks: int
    used: int
    rows: int
    head_blocks: int = 0
    draining: bool = False
    ready: bool = True

    @property
    def freeness(self) -> float:
        if self.draining or not self.ready:
            return float("-inf")
        return (self.blocks - self.used - self.head_blocks) / max(1, self.rows)

    @property
    def open(self) -> bool:
        """Whether new requests may be sent to it."""
        return self.ready and not self.draining


@dataclass(frozen=True, slots=True)
class MoveCosts:
    """What it costs a replica to go on with a request of another: computing its tokens, or taking its keys and values.

    >>> costs = MoveCosts(step_fixed_s=0.03, prompt_s=4e-4, pair_s=0.0, kv_bytes_per_token=20_000)
    >>> costs.by_blocks(500, bytes_per_s=1e9), costs.by_blocks(500, bytes_per_s=1e6)
    (True, False)
    """

    step_fixed_s: float
    prompt_s: float
    pair_s: float
    kv_bytes_per_token: float

    @staticmethod
    def of(profile: GenerationProfile) -> "MoveCosts":
        """Returns the costs of a replica with this profile."""
        return MoveCosts(profile.step_fixed_s, profile.prompt_s, profile.pair_s, profile.kv_bytes_per_token)

    def by_blocks(self, tokens: int, bytes_per_s: float) -> bool:
        """Whether copying the keys and values of so many tokens takes less time than computing them again."""
        compute_s = self.step_fixed_s + self.prompt_s * tokens + self.pair_s * tokens * (tokens + 1) / 2
        return tokens * self.kv_bytes_per_token / bytes_per_s < compute_s


def freest(standings: Iterable[Standing]) -> int | None:
    """Returns the replica that is freest, the first of equals; None if none is open."""
    found = [each for each in standings if each.open]
    return max(found, key=lambda each: (each.freeness, -each.id)).id if found else None


def moves(standings: Sequence[Standing], *, least_gap: float = 0.0) -> list[tuple[int, int]]:
    """Returns pairs (from, to) of replicas between which one request should move: the least free with the freest.

    A pair is made if the source drains, or if its freeness is below that of the target by more than ``least_gap`` and
    it has rows to give. Each replica is in at most one pair.
    """
    ranked = sorted((each for each in standings if each.ready), key=lambda each: (each.freeness, each.id))
    pairs = []
    while len(ranked) > 1:
        source, target = ranked.pop(0), ranked.pop()
        if not target.open or not source.rows or not (source.draining or target.freeness - source.freeness > least_gap):
            break
        pairs.append((source.id, target.id))
    return pairs
