"""Any schedule of arrivals, cancels and failures: one outcome each, tokens once, blocks conserved, no starving."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.generation.policies.by_name import POLICIES, make_policy
from isthmus.cloud.generation.scheduling.blocks import BlockTable
from isthmus.cloud.generation.scheduling.bound import goodput_bound, mean_latency_bound_s
from isthmus.cloud.generation.scheduling.engine import Engine, Overloaded
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Outcome, Request
from isthmus.cloud.generation.scheduling.simulate import VirtualWorld, serve
from isthmus.cloud.generation.scheduling.step import Decision, Drawn, Ended, Token
from isthmus.cloud.generation.scheduling.workload import Workload

PROFILE = reference_profile()


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Workload, Limits]:
    blocks = draw(st.integers(6, 24))
    limits = Limits(rows=draw(st.integers(1, 5)), blocks=blocks, block_tokens=4, step_tokens=draw(st.integers(4, 40)))
    requests, lengths, at_s = [], [], 0.0
    for id in range(draw(st.integers(1, 9))):
        at_s += draw(st.sampled_from([0.0, 0.01, 0.2, 3.0]))
        prompt = draw(st.integers(1, 4 * blocks - 2))
        tokens = draw(st.integers(1, 4 * blocks - prompt))
        deadline_s = draw(st.one_of(st.none(), st.floats(0.05, 5.0)))
        requests.append(
            Request(
                id,
                range(prompt),
                tokens,
                arrival_s=at_s,
                user=draw(st.sampled_from("ab")),
                deadline_s=None if deadline_s is None else at_s + deadline_s,
            )
        )
        lengths.append(draw(st.integers(1, tokens)))
    return Workload(tuple(requests), tuple(lengths)), limits


def check_blocks(engine: Engine, limits: Limits, ids: range) -> None:
    owned = [block for id in ids for block in engine.blocks_of(id)]
    assert len(owned) == len(set(owned))
    assert len(owned) + engine.free_blocks == limits.blocks


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(made=workloads(), data=st.data())
def test_every_request_ends_once_and_tokens_come_once(
    policy: str, made: tuple[Workload, Limits], data: st.DataObject
) -> None:
    workload, limits = made
    engine = Engine(PROFILE, make_policy(policy), limits, max_requests=data.draw(st.integers(1, 10)))
    coming = list(workload.requests)
    accepted: set[int] = set()
    ends: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    dropped: Counter[int] = Counter()
    now_s, steps = 0.0, 0
    while coming or engine.under_way:
        while coming and coming[0].arrival_s <= now_s:
            try:
                engine.submit(coming[0], now_s)
                accepted.add(coming[0].id)
            except Overloaded:
                pass
            coming.pop(0)
        decision: Decision = engine.next_step(now_s)
        ends.update(ended.life.id for ended in decision.ended)
        dropped.update(decision.drop)
        check_blocks(engine, limits, range(len(workload.requests)))
        if decision.step is None:
            assert coming or not engine.under_way, "everybody waits for ever"
            if coming:
                now_s = max(now_s, coming[0].arrival_s)
            continue
        steps += 1
        assert steps < 3_000, "no progress"
        step = decision.step
        assert len({row.id for row in step.rows}) == len(step.rows)
        now_s += step.predicted_s
        if data.draw(st.integers(0, 9)) == 0:
            left = engine.cancel(data.draw(st.sampled_from(sorted(accepted))), now_s)
            if left is not None:
                ends[left.life.id] += 1
        if data.draw(st.integers(0, 19)) == 0:
            ends.update(ended.life.id for ended in engine.failed(step, now_s))
            continue
        drawn = {
            row.id: Drawn(1, last=row.first + len(row.tokens) - len(row.request.prompt) + 1 >= workload.lengths[row.id])
            for row in step.rows
            if row.draws
        }
        for event in engine.finished(step, drawn, now_s):
            if isinstance(event, Token):
                assert event.index == tokens[event.life.id]
                tokens[event.life.id] += 1
            else:
                ends[event.life.id] += 1
                if event.outcome is Outcome.FINISHED:
                    assert tokens[event.life.id] == workload.lengths[event.life.id]
        check_blocks(engine, limits, range(len(workload.requests)))
    assert ends == dict.fromkeys(accepted, 1)
    assert sum(engine.outcomes.values()) == len(accepted)
    assert engine.free_blocks == limits.blocks
    engine.next_step(now_s)


@pytest.mark.parametrize("policy", ["fused", "srpt", "baton"])
@settings(max_examples=10)
@given(made=workloads())
def test_without_wishes_everybody_finishes_and_no_bound_is_passed(policy: str, made: tuple[Workload, Limits]) -> None:
    workload, limits = made
    patient = [replace(each, deadline_s=None) for each in workload.requests]
    engine = Engine(PROFILE, make_policy(policy), limits, adapts=False)
    run = serve(engine, patient, VirtualWorld(PROFILE, workload.lengths))
    assert {end.life.id: len(end.life.tokens) for end in run.ends} == dict(enumerate(workload.lengths))
    mean_s = sum(end.end_s - end.life.request.arrival_s for end in run.ends) / len(run.ends)
    assert mean_s >= mean_latency_bound_s(workload, PROFILE, limits.rows) - 1e-9
    engine = Engine(PROFILE, make_policy(policy), limits, adapts=False, expires=False)
    run = serve(engine, workload.requests, VirtualWorld(PROFILE, workload.lengths))
    in_time = sum(end.in_time for end in run.ends) / len(workload.requests)
    assert in_time <= goodput_bound(workload, PROFILE, limits.rows, slots=50) + 1e-6


@settings(max_examples=10)
@given(made=workloads(), policy=st.sampled_from(sorted(POLICIES)))
def test_the_same_clock_gives_the_same_decisions(made: tuple[Workload, Limits], policy: str) -> None:
    """What a live engine decides is what the simulator decides: nothing but the arguments counts."""
    workload, limits = made

    def decisions() -> list[object]:
        found: list[object] = []
        engine = Engine(PROFILE, make_policy(policy), limits)

        class Noting(VirtualWorld):
            def run(self, step):  # type: ignore[no-untyped-def]
                found.append((self.now_s(), step))
                return super().run(step)

        run = serve(engine, workload.requests, Noting(PROFILE, workload.lengths))
        found += [(end.life.id, end.outcome, end.end_s) for end in run.ends]
        return found

    assert decisions() == decisions()


@settings(max_examples=60)
@given(steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=30))
def test_blocks_are_never_lost_or_shared(steps: list[tuple[int, int]]) -> None:
    table = BlockTable(12, block_tokens=4)
    for id, tokens in steps:
        if tokens == 0:
            table.release(id)
        elif table.missing(id, tokens) > table.free:
            with pytest.raises(ValueError, match="are free"):
                table.grow(id, tokens)
        else:
            before = table.owned(id)
            assert table.grow(id, tokens)[: len(before)] == before
        owned = [block for owner in table.owners for block in table.owned(owner)]
        assert len(owned) == len(set(owned)) == 12 - table.free
        assert all(0 <= block < 12 for block in owned)
    for owner in table.owners:
        table.release(owner)
    assert table.grow(9, 48) == tuple(range(12))  # one run again


def test_the_counters_of_two_users_who_wait_stay_close() -> None:
    """The bound of VTC: two users with work waiting differ by at most a step's and a prompt's worth of service."""
    limits = Limits(rows=4, blocks=400, block_tokens=4)
    policy = make_policy("vtc")
    engine = Engine(PROFILE, policy, limits, adapts=False)
    requests = [Request(id, range(20), 30, arrival_s=0.0, user="heavy" if id < 60 else "light") for id in range(80)]
    served: Counter[str] = Counter()
    for request in requests:
        engine.submit(request, 0.0)
    now_s = 0.0
    while engine.under_way and any(each.request.user == "light" for each in engine._lives.values()):
        step = engine.next_step(now_s).step
        assert step is not None
        now_s += step.predicted_s
        for row in step.rows:
            served[row.request.user] += len(row.tokens) if row.first < 20 else 2
        engine.finished(step, {row.id: Drawn(0) for row in step.rows if row.draws}, now_s)
        if now_s > 2:
            assert abs(served["heavy"] - served["light"]) <= 2 * limits.rows * (20 + 2 * 30)
    assert served["light"] > 0.6 * served["heavy"]


def test_a_request_that_does_not_fit_lets_smaller_ones_pass_for_a_bounded_time() -> None:
    limits = Limits(rows=8, blocks=20, block_tokens=4)
    engine = Engine(PROFILE, make_policy("fused"), limits, adapts=False)
    small = [Request(id, range(8), 20, arrival_s=0.05 * id) for id in range(1, 400)]
    requests = [Request(0, range(8), 20, arrival_s=0.0), *small]
    requests.insert(3, Request(1_000, range(70), 5, arrival_s=0.1))
    lengths = {request.id: request.max_tokens for request in requests}
    run = serve(engine, requests, VirtualWorld(PROFILE, lengths))  # type: ignore[arg-type]
    (large,) = [end for end in run.ends if end.life.id == 1_000]
    assert large.outcome is Outcome.FINISHED
    passed = sum(end.end_s < large.end_s for end in run.ends)
    assert 10 < passed < 200


def test_ended_is_reported_with_the_answer_that_stands() -> None:
    engine = Engine(PROFILE, make_policy("fused"))
    engine.submit(Request(0, range(3), 9, arrival_s=0.0), 0.0)
    step = engine.next_step(0.0).step
    assert step is not None
    engine.finished(step, {0: Drawn(4)}, 0.1)
    ended = engine.cancel(0, 0.2)
    assert isinstance(ended, Ended) and ended.life.tokens == [4]
