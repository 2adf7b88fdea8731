"""PURE: decides which waiting queries share a batch, by similar deadline and utility (OTAS, Alg. 1).

It decides nothing about tokens: ``otas.py``, ``throughput.py`` and ``baselines.py`` pick the gamma of these batches.
"""

from dataclasses import dataclass
from typing import Final

from isthmus.cloud.elastic.scheduling.query import Batch, Query

DELTA_S: Final = 0.5
EPSILON: Final = 64
ETA_S: Final = 0.5
MU: Final = 0.8


@dataclass(frozen=True, slots=True)
class BatchingRule:
    """The conditions for a query to join a batch.

    The batch's first query arrived at most ``delta_s`` ago. The batch holds fewer than ``epsilon`` queries. Its
    earliest deadline is within ``eta_s`` of the query's, and its first query's utility within ``mu`` of the query's.
    """

    delta_s: float = DELTA_S
    epsilon: int = EPSILON
    eta_s: float = ETA_S
    mu: float = MU


class _Open:
    """A batch that may still grow. ``deadline_s`` is its earliest."""

    __slots__ = ("batch", "deadline_s", "queries")

    def __init__(self, query: Query) -> None:
        self.queries = [query]
        self.deadline_s = query.deadline_s
        self.batch: Batch | None = None

    def frozen(self) -> Batch:
        if self.batch is None:
            self.batch = Batch(tuple(self.queries))
        return self.batch


class BatchQueue:
    """The batches of Alg. 1, newest last. A batch that loses queries keeps the others; an empty batch is removed."""

    def __init__(self, rule: BatchingRule | None = None) -> None:
        self.rule = rule if rule is not None else BatchingRule()
        self._batches: list[_Open] = []
        self._home: dict[int, _Open] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, query: Query) -> None:
        """Adds ``query`` to the newest batch that accepts it, or to a new batch (Alg. 1).

        The search goes from the newest batch to older ones and stops at the first that is too old.
        """
        rule = self.rule
        for batch in reversed(self._batches):
            first = batch.queries[0]
            if first.arrival_s + rule.delta_s < query.arrival_s:
                break
            if (
                len(batch.queries) < rule.epsilon
                and abs(batch.deadline_s - query.deadline_s) <= rule.eta_s
                and abs(first.utility - query.utility) <= rule.mu
            ):
                batch.queries.append(query)
                batch.deadline_s = min(batch.deadline_s, query.deadline_s)
                batch.batch = None
                self._home[query.id] = batch
                return
        opened = _Open(query)
        self._batches.append(opened)
        self._home[query.id] = opened

    def remove(self, query: Query) -> None:
        """Removes ``query`` from its batch. Raises KeyError if it is in no batch."""
        batch = self._home.pop(query.id)
        batch.batch = None
        if len(batch.queries) == 1:
            self._batches.remove(batch)
            return
        batch.queries.remove(query)
        if query.deadline_s == batch.deadline_s:
            batch.deadline_s = min(other.deadline_s for other in batch.queries)

    def by_deadline(self) -> list[Batch]:
        """Returns all batches, earliest deadline first. Of equal deadlines the older batch is first."""
        return [batch.frozen() for batch in sorted(self._batches, key=lambda batch: batch.deadline_s)]
