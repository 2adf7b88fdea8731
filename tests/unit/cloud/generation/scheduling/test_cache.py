"""Kept answers: who may get them, for how long, how many; neighbours, the guard, and when a search pays."""

from typing import Any

import numpy as np
import pytest

from isthmus.cloud.generation.scheduling.cache import TRIALS, AnswerCache, CacheRule, Question, alike

SHARED = CacheRule(threshold=0.9, floor=0.8, lifetime_s=10.0, quota=3, shared=True)
PERSONAL = CacheRule(threshold=0.9, floor=0.9)


def question(text: str, kind: str = "faq", user: str = "ada", scope: tuple[str, ...] = ()) -> Question:
    return Question(kind, user, scope, text)


def vector(cosine: float) -> Any:
    """A vector whose cosine with the first axis is this."""
    return np.array([cosine, np.sqrt(1 - cosine * cosine)], np.float32)


@pytest.fixture
def cache() -> AnswerCache:
    return AnswerCache({"faq": SHARED, "diary": PERSONAL})


def test_classes_without_a_rule_are_not_kept(cache: AnswerCache) -> None:
    assert not cache.serves(question("x", kind="")) and not cache.searches(question("x", kind="other"))
    assert cache.exact(question("x", kind="other"), 0.0) is None


def test_only_a_shared_class_gives_answers_of_one_user_to_another(cache: AnswerCache) -> None:
    for kind in ("faq", "diary"):
        cache.add(question("How do I reset it?", kind), kind, 0.0, vector(1.0))
        assert cache.exact(question("how do I  reset it", kind), 1.0) == kind
    assert cache.exact(question("How do I reset it?", "faq", "bob"), 1.0) == "faq"
    assert cache.exact(question("How do I reset it?", "diary", "bob"), 1.0) is None
    assert cache.nearest(question("Tell me how to reset it", "faq", "bob"), vector(0.95), 1.0) == "faq"
    assert cache.nearest(question("Tell me how to reset it", "diary", "bob"), vector(0.95), 1.0) is None


def test_another_state_of_the_user_model_or_earlier_turn_is_another_question(cache: AnswerCache) -> None:
    cache.add(question("Hello", scope=("sad",)), "There, there", 0.0, vector(1.0))
    assert cache.exact(question("Hello", scope=("happy",)), 0.0) is None
    assert cache.nearest(question("Hello", scope=("happy",)), vector(1.0), 0.0) is None


def test_answers_age_and_the_oldest_makes_room(cache: AnswerCache) -> None:
    for at in range(4):
        cache.add(question(f"question {at}"), at, float(at))
    assert [cache.exact(question(f"question {at}"), 4.0) for at in range(4)] == [None, 1, 2, 3]
    assert cache.exact(question("question 3"), 13.1) is None
    assert len(cache) == 3


def test_the_threshold_falls_with_the_load_and_never_below_the_floor(cache: AnswerCache) -> None:
    cache.add(question("How do I reset it?"), "so", 0.0, vector(1.0))
    near = question("Tell me how to reset it")
    assert cache.nearest(near, vector(0.85), 0.0) is None
    assert cache.nearest(near, vector(0.85), 0.0, pressure=1.0) == "so"
    assert cache.nearest(near, vector(0.79), 0.0, pressure=9.0) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Sort the list ascending", "Sort the list descending"),
        ("Turn on the light", "Turn off the light"),
        ("Is it safe to eat?", "Is it not safe to eat?"),
        ("You can park here", "You can't park here"),
        ("You can park here", "You can\N{RIGHT SINGLE QUOTATION MARK}t park here"),
        ("Take 2 tablets", "Take 3 tablets"),
        ("A trip from 9 to 5", "A trip from 9"),
        ("Convert 1.5 miles", "Convert 15 miles"),
        ("Buy shares", "Sell shares"),
    ],
)
def test_the_guard_refuses_what_no_cosine_tells_apart(cache: AnswerCache, first: str, second: str) -> None:
    assert not alike(first, second) and not alike(second, first) and alike(first, first)
    cache.add(question(first), "wrong", 0.0, vector(1.0))
    assert cache.nearest(question(second), vector(0.999), 0.0) is None


def test_a_neighbour_behind_a_refused_one_is_found(cache: AnswerCache) -> None:
    cache.add(question("Sort it ascending"), "up", 0.0, vector(1.0))
    cache.add(question("Order it downwards, descending"), "down", 0.0, vector(0.95))
    assert cache.nearest(question("Sort it descending"), vector(1.0), 0.0) == "down"


def test_a_search_is_left_out_once_it_does_not_pay(cache: AnswerCache) -> None:
    cache.add(question("kept"), "kept", 0.0, vector(1.0))
    cache.took("faq", search_s=0.01, model_s=0.1)
    for _ in range(TRIALS):
        assert cache.searches(question("x"))
        cache.nearest(question("x"), vector(0.0), 0.0)
    assert not cache.searches(question("x")), "none of the searches has found anything"
    for _ in range(TRIALS):
        cache.nearest(question("kept it"), vector(1.0), 0.0)
    assert cache.searches(question("x"))


@pytest.mark.parametrize(
    "raw",
    [[], {"faq": 3}, {"faq": {"ttl": 3}}, {"faq": {"threshold": 0.4}}, {"faq": {"floor": 0.99}}, {"faq": {"quota": 0}},
     {"faq": {"lifetime_s": -1}}, {"faq": {"threshold": "high"}}],
)  # fmt: skip
def test_rules_out_of_range_are_refused(raw: Any) -> None:
    with pytest.raises(ValueError, match="class"):
        CacheRule.read(raw)
    assert CacheRule.read({"faq": {"shared": True}})["faq"].shared
