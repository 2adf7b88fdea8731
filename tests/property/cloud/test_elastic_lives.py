"""Every accepted query has exactly one outcome, under every policy, for any arrivals, failures and clock."""

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isthmus.cloud.elastic.policies.by_name import POLICIES, make_policy
from isthmus.cloud.elastic.policies.infaas import Infaas, sizes_profile
from isthmus.cloud.elastic.scheduling.engine import Decision, Engine, Overloaded, Work
from isthmus.cloud.elastic.scheduling.profile import Profile, paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query

PROFILE = paper_profile()
WITH_MEMORY = Profile(
    PROFILE.key,
    PROFILE.gammas,
    PROFILE.sizes,
    PROFILE.accuracy,
    PROFILE.latency_s,
    dict.fromkeys(PROFILE.gammas, (100, 6_400)),
)
LIMIT_BYTES = 900
MAX_WAITING = 40


class Lives(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from([*POLICIES, "fixed:-15", "infaas"]), executors=st.integers(1, 3))
    def begin(self, policy: str, executors: int) -> None:
        sizes = sizes_profile(PROFILE)
        self.engine = Engine(
            sizes if policy == "infaas" else WITH_MEMORY,
            Infaas() if policy == "infaas" else make_policy(policy, WITH_MEMORY),
            max_waiting=MAX_WAITING,
            memory_limit_bytes=LIMIT_BYTES,
            executors=executors,
        )
        self.memory_known = policy != "infaas"
        self.keeps_to_gammas = policy == "priced"
        self.now_s = 100.0
        self.taken: dict[int, Query] = {}
        self.ended: Counter[int] = Counter()
        self.outcomes: Counter[Outcome] = Counter()
        self.running: list[Work] = []

    def end(self, query: Query, outcome: Outcome) -> None:
        self.ended[query.id] += 1
        self.outcomes[outcome] += 1

    @rule(
        count=st.integers(1, 30),
        task=st.sampled_from(sorted(PROFILE.accuracy)),
        latency_s=st.sampled_from([0.001, 0.05, 0.6, 1.0, 30.0]),
        utility=st.sampled_from([0.0, 1e-300, 0.01, 0.2, 0.3, 1.0, 1e6]),
        late_s=st.sampled_from([0.0, 0.0, 0.3]),
        gammas=st.sampled_from([None, None, frozenset({0}), frozenset({-20, 8})]),
    )
    def arrive(
        self,
        count: int,
        task: str,
        latency_s: float,
        utility: float,
        late_s: float,
        gammas: frozenset[int] | None,
    ) -> None:
        permitted = gammas if self.keeps_to_gammas else None
        for _ in range(count):
            query = Query.asked(len(self.taken), task, self.now_s - late_s, latency_s, utility, permitted)
            try:
                self.engine.submit(query, self.now_s)
            except Overloaded:
                assert self.engine.waiting == MAX_WAITING
                return
            self.taken[query.id] = query

    @rule()
    def ask(self) -> None:
        self.take(self.engine.next_work(self.now_s))

    @precondition(lambda self: hasattr(self, "running") and len(self.running) < self.engine.executors)
    @rule(data=st.data())
    def ask_for_one(self, data: st.DataObject) -> None:
        free = sorted(set(range(self.engine.executors)) - {work.executor for work in self.running})
        executor = data.draw(st.sampled_from(free))
        decision = self.engine.next_work(self.now_s, executor)
        assert decision.work is None or decision.work.executor == executor
        self.take(decision)

    def take(self, decision: Decision) -> None:
        for query in decision.evicted:
            self.end(query, Outcome.EVICTED)
        if decision.work is not None:
            work = decision.work
            assert all(query.may_run_at(work.gamma) for query in work.batch.queries)
            if self.memory_known:
                assert WITH_MEMORY.memory_bytes(work.gamma, len(work.batch)) <= LIMIT_BYTES
            self.running.append(work)

    @rule()
    def expire(self) -> None:
        for query in self.engine.expire(self.now_s):
            self.end(query, Outcome.EVICTED)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), right=st.sampled_from([True, False, None]))
    def finish(self, data: st.DataObject, right: bool | None) -> None:
        work = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        for query, outcome in self.engine.finished(work, [right] * len(work.batch), self.now_s):
            self.end(query, outcome)

    @precondition(lambda self: self.running)
    @rule()
    def break_down(self) -> None:
        for query, outcome in self.engine.failed(self.running.pop(), self.now_s):
            self.end(query, outcome)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        query = self.engine.cancel(data.draw(st.integers(0, len(self.taken) - 1)))
        if query is not None:
            self.end(query, Outcome.EVICTED)

    @rule(step_s=st.sampled_from([0.001, 0.05, 0.4, 100.0, -50.0]))
    def pass_time(self, step_s: float) -> None:
        self.now_s += step_s

    @invariant()
    def nobody_ends_twice_and_nobody_is_lost(self) -> None:
        if not hasattr(self, "taken"):
            return
        assert all(count == 1 for count in self.ended.values())
        in_flight = sum(len(work.batch) for work in self.running)
        assert len(self.taken) == len(self.ended) + self.engine.waiting + in_flight
        assert +self.engine.outcomes == +self.outcomes
        assert self.engine.running == len(self.running)
        assert len({work.executor for work in self.running}) == len(self.running)

    def teardown(self) -> None:
        if not hasattr(self, "taken"):
            return
        self.now_s = 1e6
        while self.running:
            self.break_down()
        self.ask()
        assert self.engine.waiting == 0 and not self.running
        assert self.ended.keys() == self.taken.keys()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
