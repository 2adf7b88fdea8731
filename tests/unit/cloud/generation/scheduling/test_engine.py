"""The engine's rules, one by one: lives, deadlines, blocks, refusals, and what a policy may not do."""

from collections.abc import Sequence

import pytest

from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.scheduling.engine import Engine, Overloaded
from isthmus.cloud.generation.scheduling.policy import Choice, Life, Limits, State
from isthmus.cloud.generation.scheduling.profile import (
    BadProfile,
    GenerationProfile,
    Load,
    reference_profile,
)
from isthmus.cloud.generation.scheduling.request import Outcome, Request, Sampling
from isthmus.cloud.generation.scheduling.step import Drawn, Ended, Token
from isthmus.proto.errors import InvalidInput

SMALL = Limits(rows=3, blocks=8, block_tokens=4, step_tokens=16)


def request(id: int, prompt: int = 5, tokens: int = 4, at: float = 0.0, **wishes: float) -> Request:
    return Request(id, range(prompt), tokens, arrival_s=at, **wishes)  # type: ignore[arg-type]


def engine(limits: Limits = SMALL, **options: object) -> Engine:
    return Engine(reference_profile(), make_policy("fused"), limits, **options)  # type: ignore[arg-type]


def test_a_request_from_submission_to_its_outcome() -> None:
    served = engine()
    served.submit(request(1), 0.0)
    first = served.next_step(0.0).step
    assert first is not None
    assert [(row.id, row.first, list(row.tokens), row.draws) for row in first.rows] == [(1, 0, [0, 1, 2, 3, 4], True)]
    assert first.predicted_s == pytest.approx(0.034 + 5 * 0.42e-3 + 15 * 0.4e-6)
    assert served.next_step(0.01).step is None  # one step at a time
    events = served.finished(first, {1: Drawn(70)}, 0.1)
    assert isinstance(events[0], Token) and (events[0].index, events[0].token) == (0, 70)
    second = served.next_step(0.1).step
    assert second is not None
    assert [(row.first, list(row.tokens), row.blocks) for row in second.rows] == [(5, [70], (0, 1))]
    ended = served.finished(second, {1: Drawn(71, last=True)}, 0.2)[-1]
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.in_time, ended.life.tokens) == (Outcome.FINISHED, True, [70, 71])
    assert (served.under_way, served.free_blocks, served.next_step(0.3).drop) == (0, 8, (1,))
    with pytest.raises(KeyError, match="does not run"):
        served.finished(second, {}, 0.3)


def test_the_answer_ends_at_max_tokens_and_may_be_late() -> None:
    served = engine(expires=False)
    served.submit(request(1, tokens=1, deadline_s=0.05), 0.0)
    step = served.next_step(0.0).step
    assert step is not None
    ended = served.finished(step, {1: Drawn(3)}, 0.2)[-1]
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.in_time) == (Outcome.FINISHED, False)


@pytest.mark.parametrize(
    ("wishes", "first_s", "end_s", "tokens", "kept"),
    [
        ({}, 9.0, 99.0, 5, True),
        ({"ttft_s": 1.0}, 0.9, 9.0, 5, True),
        ({"ttft_s": 1.0}, 1.1, 2.0, 5, False),
        ({"tpot_s": 0.1}, 1.0, 1.4, 5, True),
        ({"tpot_s": 0.1}, 1.0, 1.5, 5, False),
        ({"deadline_s": 2.0}, 1.0, 2.1, 5, False),
    ],
)
def test_an_answer_is_in_time_if_it_keeps_every_wish(
    wishes: dict[str, float], first_s: float, end_s: float, tokens: int, kept: bool
) -> None:
    assert request(1, **wishes).is_in_time(first_s, end_s, tokens) == kept


def test_who_leaves_during_a_step_frees_the_blocks_with_it() -> None:
    served = engine()
    served.submit(request(1), 0.0)
    served.submit(request(2), 0.0)
    step = served.next_step(0.0).step
    assert step is not None
    ended = served.cancel(1, 0.01)
    assert ended is not None and ended.outcome is Outcome.CANCELLED
    assert served.cancel(1, 0.01) is None
    assert served.blocks_of(1)  # the step writes to them still
    with pytest.raises(InvalidInput, match="submitted already"):
        served.submit(request(1), 0.02)
    events = served.finished(step, {2: Drawn(5)}, 0.1)
    assert [event.life.id for event in events] == [2]
    assert not served.blocks_of(1)
    assert served.next_step(0.1).drop == (1,)


def test_what_cannot_be_in_time_is_evicted_before_it_costs() -> None:
    served = engine()
    served.submit(request(1, deadline_s=1.0), 0.0)
    served.submit(request(2, ttft_s=0.5), 0.0)
    assert [ended.life.id for ended in served.expire(0.47)] == [2]
    assert [ended.outcome for ended in served.next_step(0.97).ended] == [Outcome.EVICTED]
    assert served.under_way == 0


def test_a_failed_step_fails_its_requests_alone() -> None:
    served = engine()
    served.submit(request(1), 0.0)
    step = served.next_step(0.0).step
    assert step is not None
    served.submit(request(2), 0.01)
    assert [(ended.life.id, ended.outcome) for ended in served.failed(step, 0.1)] == [(1, Outcome.FAILED)]
    following = served.next_step(0.1)
    assert following.step is not None and [row.id for row in following.step.rows] == [2]
    assert following.drop == (1,)


def test_what_can_never_fit_and_what_is_too_much_is_refused() -> None:
    served = engine(max_requests=2)
    with pytest.raises(InvalidInput, match="holds 32"):
        served.submit(request(1, prompt=30, tokens=3), 0.0)
    served.submit(request(1, prompt=29, tokens=3), 0.0)
    served.submit(request(2), 0.0)
    with pytest.raises(Overloaded, match="2 requests are under way"):
        served.submit(request(3), 0.0)
    assert sum(served.outcomes.values()) == 0


class Wayward:
    """A policy that returns the decisions it was given."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    def use(self, profile: GenerationProfile) -> None:
        pass

    def arrived(self, life: Life) -> None:
        pass

    def left(self, life: Life) -> None:
        pass

    def choose(self, now_s: float, state: State) -> Choice:
        return self._choice


@pytest.mark.parametrize(
    ("run", "preempt", "said"),
    [
        ([(9, 1)], [], "not under way"),
        ([(1, 1), (1, 1)], [], "one of them twice"),
        ([(1, 6)], [], "which has 5 to compute"),
        ([(1, 0)], [], "0 tokens"),
        ([(1, 5), (2, 5), (3, 5), (4, 5)], [], "the policy chose 20 tokens of 4 requests"),
        ([(1, 4), (2, 4), (3, 4), (4, 4)], [], "4 rows; there are"),
        ([(1, 1)], [8], "not under way"),
    ],
)
def test_a_policy_may_not_choose_what_does_not_fit(
    run: Sequence[tuple[int, int]], preempt: Sequence[int], said: str
) -> None:
    served = Engine(reference_profile(), Wayward(Choice(run=run, preempt=preempt)), SMALL)
    for id in range(1, 5):
        served.submit(request(id), 0.0)
    with pytest.raises(ValueError, match=said):
        served.next_step(0.0)


def test_plans_follow_the_time_that_steps_take() -> None:
    served = engine()
    served.submit(request(1, tokens=20), 0.0)
    now_s = 0.0
    for _ in range(20):
        step = served.next_step(now_s).step
        assert step is not None
        now_s += 2 * served.profile.step_s(step.load)
        served.finished(step, {1: Drawn(5)}, now_s)
    assert 1.3 < served.pace < 4
    assert served.planned.step_fixed_s == pytest.approx(served.pace * 0.034)


def test_after_a_slow_spell_requests_in_a_hurry_are_answered_again() -> None:
    """Plans of a slow machine evict each of them at once, so no step would ever show that it is fast again."""
    served = engine(Limits(rows=3, blocks=300, block_tokens=4, step_tokens=16))
    served.submit(request(1, tokens=1_000), 0.0)
    now_s = 0.0
    while served.pace < 3:
        step = served.next_step(now_s).step
        assert step is not None
        now_s += 4 * step.predicted_s / served.pace
        served.finished(step, {row.id: Drawn(1) for row in step.rows if row.draws}, now_s)
    served.cancel(1, now_s)
    served.next_step(now_s)
    answered = []
    for id in range(2, 40):
        now_s += 1.0
        served.submit(request(id, tokens=1, at=now_s, deadline_s=now_s + 0.06), now_s)
        step = served.next_step(now_s).step
        if step is not None:
            served.finished(step, {id: Drawn(1)}, now_s + 0.04)
        answered.append(step is not None)
    assert not any(answered[:5]) and all(answered[-10:])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": []}, "prompt: it is empty"),
        ({"max_tokens": 0}, "max_tokens: must be from 1 to 64"),
        ({"max_tokens": 65}, "max_tokens: must be from 1 to 64"),
        ({"prompt": range(100)}, "are more than the 128"),
        ({"stops": ["a"] * 5}, "stop: at most 4"),
        ({"stops": [""]}, "stop: each string"),
        ({"stops": ["x" * 65]}, "stop: each string"),
        ({"latency_s": float("nan")}, "latency_s: must be above 0"),
        ({"ttft_s": -1.0}, "ttft_s: must be above 0"),
        ({"utility": float("inf")}, "utility: must be from 0"),
    ],
)
def test_what_a_client_may_not_ask_is_refused_by_name(values: dict[str, object], said: str) -> None:
    asked: dict[str, object] = {"prompt": range(4), "max_tokens": 32, "arrival_s": 0.0, "context": 128, "limit": 64}
    with pytest.raises(InvalidInput, match=said):
        Request.asked(1, **{**asked, "sampling": Sampling(), **values})  # type: ignore[arg-type]


def test_loads_of_padded_steps_count_the_padding() -> None:
    spans = [(9, 1), (19, 1), (0, 4), (0, 6)]
    assert Load.of(spans) == Load(2, 30, 10, 31)
    assert Load.padded(spans, dead_rows=1) == Load(3, 60, 12, 42)


def test_a_profile_reads_its_own_json_alone() -> None:
    text = reference_profile().to_json()
    assert GenerationProfile.from_json(text) == reference_profile()
    for harmed in (
        "[]",
        "{}",
        text.replace('"prompt_s": 0.00042', '"prompt_s": -1'),
        text.replace('"format": 1', '"format": 9'),
    ):
        with pytest.raises(BadProfile):
            GenerationProfile.from_json(harmed)
