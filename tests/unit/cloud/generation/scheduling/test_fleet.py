"""Several engines under one clock: everything ends once, moves keep answers whole, a drain empties, roles divide."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cloud.generation.policies.batches import Orca
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.policies.lengths import KnownLengths
from isthmus.cloud.generation.policies.orders import Shortest
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.fleet import Fleet, FleetRules, FleetRun
from isthmus.cloud.generation.scheduling.policy import Life, Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.replicas import freest
from isthmus.cloud.generation.scheduling.request import Outcome, Request
from isthmus.cloud.generation.scheduling.workload import Workload, at_load, chat_sizes, poisson_gaps

PROFILE = reference_profile()


def workload(load: float, count: int = 40, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    return at_load(chat_sizes(rng, count), poisson_gaps(rng, count), load, PROFILE)


def serve(made: Workload, rules: FleetRules, *, replicas: int = 2, limits: Limits | None = None) -> FleetRun:
    engines = [
        Engine(
            PROFILE,
            Orca() if at < rules.prefill else Fused(),
            limits or Limits(rows=8, blocks=200),
            max_requests=len(made.requests),
            expires=False,
            adapts=False,
        )
        for at in range(replicas)
    ]
    found = Fleet(engines, PROFILE, made.requests, made.lengths, rules).serve()
    for engine in engines:
        assert engine.under_way == 0 and engine.free_blocks == engine.limits.blocks
    return found


@given(
    st.integers(0, 5),
    st.sampled_from(
        [
            FleetRules("round-robin"),
            FleetRules(),
            FleetRules(moves_every_s=0.3, least_gap=1.0),
            FleetRules(moves_every_s=0.2, drains=[(3.0, 0)]),
            FleetRules(moves_every_s=0.2, least_gap=0.0, link_bytes_per_s=1e6),
            FleetRules(prefill=1),
        ]
    ),
    st.sampled_from([Limits(rows=3, blocks=150), Limits(rows=8, blocks=70)]),
)
@settings(max_examples=12, deadline=None)
def test_every_request_ends_once_and_whole_whatever_moves(seed: int, rules: FleetRules, limits: Limits) -> None:
    made = workload(2.0, 20, seed)
    made = Workload(
        tuple(each for each in made.requests if each.most_tokens <= limits.kv_tokens + 10_000), made.lengths
    )
    requests = tuple(
        type(each)(each.id, each.prompt[:400], min(each.max_tokens, 400), each.arrival_s) for each in made.requests
    )
    lengths = tuple(min(length, 400) for length in made.lengths)
    found = serve(Workload(requests, lengths), rules, limits=limits)
    assert sorted(end.life.id for end in found.run.ends) == [each.id for each in requests]
    assert all(end.outcome is Outcome.FINISHED for end in found.run.ends)
    assert {end.life.id: len(end.life.tokens) for end in found.run.ends} == dict(enumerate(lengths))


def test_live_moves_pause_a_request_for_less_than_two_steps() -> None:
    found = serve(workload(1.8), FleetRules(moves_every_s=0.25, least_gap=1.0))
    assert found.pauses_s and max(found.pauses_s) < 2 * PROFILE.step_fixed_s
    assert any(end.life.moved for end in found.run.ends)


def test_a_drained_replica_is_empty_soon_and_sooner_than_without_moves() -> None:
    drains = [(5.0, 0)]
    with_moves = serve(workload(1.2), FleetRules(moves_every_s=0.1, drains=drains)).emptied_s[0]
    without = serve(workload(1.2), FleetRules(drains=drains)).emptied_s[0]
    assert 5.0 <= with_moves < without


def test_with_replicas_for_prompts_each_answer_goes_on_elsewhere_after_its_first_token() -> None:
    apart = serve(workload(1.2), FleetRules(prefill=1), limits=Limits(rows=32, blocks=600))
    assert all(end.life.moved == (len(end.life.tokens) > 1) for end in apart.run.ends)


def test_a_moved_request_teaches_no_length_before_its_end() -> None:
    learned: list[int] = []

    class Told(KnownLengths):
        def learn(self, life: Life) -> None:
            learned.append(len(life.tokens))

    made = workload(1.0, 2)
    engines = [Engine(PROFILE, Fused(Shortest("sjf", Told(lambda id: 9))), expires=False) for _ in range(2)]
    engines[0].submit(made.requests[0], 0.0)
    life = engines[0].lives[made.requests[0].id]
    engines[1].adopt(engines[0].export(life.id, 0.0), 0.0)
    assert learned == [] and engines[0].under_way == 0 and engines[1].under_way == 1
    with pytest.raises(ValueError, match="does not fit"):
        engines[1].adopt(life, 0.0)


def test_requests_of_one_burst_are_shared_although_no_step_runs_between_them() -> None:
    engines = [Engine(PROFILE, Fused(), Limits(rows=2, blocks=100), expires=False) for _ in range(2)]
    for id in range(4):
        at = freest(engine.standing(at) for at, engine in enumerate(engines))
        assert at is not None
        engines[at].submit(Request(id, range(50), 4, 0.0), 0.0)
    assert [engine.under_way for engine in engines] == [2, 2]
    engines[0].submit(Request(9, range(160), 4, 0.0), 0.0)
    assert (engines[0].standing(0).head_blocks, engines[0].standing(0).rows) == (10, 2), "it waits for a row"


def test_at_least_one_replica_decodes() -> None:
    with pytest.raises(ValueError, match="at least one must decode"):
        serve(workload(1.0, 2), FleetRules(prefill=2))
