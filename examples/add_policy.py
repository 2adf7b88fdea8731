"""Add a scheduling policy, and compare it with the built-in ones on the same queries.

    python examples/add_policy.py

The policy below answers the waiting query with the earliest deadline, one query per batch. It takes away the most
tokens (the lowest gamma) while more than ten queries wait, and none otherwise. The engine runs it under a virtual
clock, beside three built-in policies and a bound that no policy can pass. Nothing is trained; it takes seconds.
"""

import numpy as np

from isthmus import (
    Choice,
    Engine,
    Profile,
    Query,
    add_policy,
    clairvoyant_bound,
    make_policy,
    paper_profile,
    queries_at_load,
    simulate,
)


class EarliestDeadline:
    """One query per batch, the most urgent first, with few tokens while the queue is long."""

    def __init__(self, long_queue: int = 10) -> None:
        self._long_queue = long_queue
        self._waiting: dict[int, Query] = {}

    @property
    def gammas(self) -> tuple[int, ...]:
        return self._gammas

    def use(self, profile: Profile) -> None:
        self._gammas = (min(profile.gammas), 0)
        self._profile = profile

    def arrived(self, query: Query) -> None:
        self._waiting[query.id] = query

    def left(self, query: Query) -> None:
        del self._waiting[query.id]

    def choose(self, now_s: float) -> Choice:
        gamma = min(self._gammas) if len(self._waiting) > self._long_queue else 0
        ready_s = now_s + self._profile.batch_time_s(gamma, 1)
        by_deadline = sorted(self._waiting.values(), key=lambda query: query.deadline_s)
        in_time = [query for query in by_deadline if query.deadline_s >= ready_s]
        late = tuple(query for query in by_deadline if query.deadline_s < ready_s)
        return Choice(queries=tuple(in_time[:1]), gamma=gamma, evict=late)


def main() -> None:
    add_policy("earliest_deadline", EarliestDeadline)

    profile = paper_profile()
    rng = np.random.default_rng(0)
    arrivals_per_s = np.full(10, 400.0)  # ten seconds, scaled below to 1.5 times what the machine serves at gamma 0
    queries = queries_at_load(rng, arrivals_per_s, load=1.5, profile=profile)
    luck_N = rng.random(len(queries))  # a query is answered correctly if its number is below the profiled accuracy

    bound = clairvoyant_bound(queries, profile, 64)
    print(f"{len(queries)} queries in 10 s; no policy can earn more than {bound:.0f}")
    for name in ("earliest_deadline", "pets", "otas", "priced"):
        run = simulate(Engine(profile, make_policy(name, profile)), queries, luck_N)
        print(f"{name:18} earns {run.expected_utility:6.1f}, {100 * run.expected_utility / bound:5.1f} % of the bound")


if __name__ == "__main__":
    main()
