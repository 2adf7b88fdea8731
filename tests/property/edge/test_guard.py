"""The guard's estimates against loops over clips, and its verdicts where the right one is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.own_clips.guard import (
    CORRECTIONS,
    DEFAULT_ESTIMATOR,
    FEWEST_CORRECTIONS,
    Estimator,
    Outputs,
    Rule,
    by_corrections,
    estimates,
    judge,
)


def random_outputs(seed: int, clips: int, classes: int, threshold: float | None = 0.5) -> Outputs:
    rng = np.random.default_rng(seed)
    local_NC, teacher_NC = (rng.dirichlet(np.ones(classes), clips).astype(np.float32) for _ in range(2))
    return Outputs(local_NC, teacher_NC, threshold)


shapes = st.tuples(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 5))


@given(shapes, st.floats(0, 1))
def test_estimates_as_by_hand(shape: tuple[int, int, int], threshold: float) -> None:
    seed, clips, classes = shape
    one, other = random_outputs(seed, clips, classes, threshold), random_outputs(seed + 1, clips, classes)
    totals = dict.fromkeys(Estimator, 0.0)
    for n in range(clips):
        answer = int(np.argmax(one.local_NC[n]))
        totals[Estimator.CONFIDENCE] += float(one.local_NC[n, answer])
        totals[Estimator.ATC] += one.local_NC[n, answer] >= threshold
        totals[Estimator.AGREEMENT] += answer == int(np.argmax(one.teacher_NC[n]))
        totals[Estimator.TEACHER] += float(one.teacher_NC[n, answer])
        totals[Estimator.JOINT] += float((one.teacher_NC[n, answer] + other.teacher_NC[n, answer]) / 2)
        totals[Estimator.CROSS] += float(other.teacher_NC[n, answer])
        totals[Estimator.PRESENT] += float(other.local_NC[n, answer])
    made = estimates(one, other, other)
    assert set(made) == set(Estimator)
    for estimator, total in totals.items():
        assert made[estimator] == pytest.approx(total / clips, abs=1e-6)
        assert 0 <= made[estimator] <= 1 + 1e-6


@given(shapes, st.sampled_from(Estimator), st.floats(-0.5, 0.5))
def test_a_verdict_follows_its_estimates_and_margin(
    shape: tuple[int, int, int], estimator: Estimator, margin: float
) -> None:
    old, new = random_outputs(*shape), random_outputs(shape[0] + 1, *shape[1:])
    verdict = judge(old, new, Rule(estimator, margin))
    assert verdict.accept == (verdict.new[estimator.value] >= verdict.old[estimator.value] + margin)
    assert ("not good enough" in verdict.reason) != verdict.accept
    assert (verdict.clips, verdict.rule.margin) == (shape[1], margin)
    assert 0 <= verdict.changed <= verdict.clips


@given(shapes, st.sampled_from(Estimator))
def test_the_same_student_again_is_taken_and_gains_nothing(shape: tuple[int, int, int], estimator: Estimator) -> None:
    same = random_outputs(*shape)
    assert judge(same, same, Rule(estimator, margin=0)).accept
    assert judge(same, same).changed == 0
    assert not judge(same, same, Rule(estimator, margin=1e-6)).accept


@given(st.integers(1, 20), st.integers(2, 6))
def test_a_sure_student_that_is_wrong_is_refused(clips: int, classes: int) -> None:
    """All clips are equal (one to many): the new student is confident of a class that no other head gives."""
    truth_NC = np.tile(np.eye(classes, dtype=np.float32)[0] * 0.6 + 0.4 / classes, (clips, 1))
    wrong_NC = np.tile(np.eye(classes, dtype=np.float32)[1], (clips, 1))
    verdict = judge(Outputs(truth_NC, truth_NC), Outputs(wrong_NC, truth_NC))
    assert not verdict.accept
    assert verdict.changed == clips
    replaced = Outputs(wrong_NC, truth_NC), Outputs(truth_NC, truth_NC)
    assert judge(*replaced, Rule(Estimator.CROSS, margin=0)).accept
    assert not judge(*replaced).accept, "the present student is trusted, sure and wrong as it may be"


def test_what_cannot_be_judged_is_said() -> None:
    good = random_outputs(0, 3, 4)
    none = np.zeros((0, 4), np.float32)
    with pytest.raises(ValueError, match="no clip"):
        judge(Outputs(none, none), Outputs(none, none))
    with pytest.raises(ValueError, match="same clips"):
        judge(good, random_outputs(0, 2, 4))
    with pytest.raises(ValueError, match="not finite"):
        judge(good, Outputs(good.local_NC, np.full((3, 4), np.nan, np.float32)))
    unmeasured = random_outputs(1, 3, 4, threshold=None)
    assert Estimator.ATC not in estimates(unmeasured, good, good)
    with pytest.raises(ValueError, match="no threshold"):
        judge(good, unmeasured, Rule(Estimator.ATC))
    assert DEFAULT_ESTIMATOR is not Estimator.ATC, "older students have no threshold, and must still be judged"


@given(st.integers(0, 2**32), st.integers(0, 8), st.integers(2, 4))
def test_what_the_person_said_decides_from_four_clips_on(seed: int, told: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = random_outputs(seed, 8, classes), random_outputs(seed + 1, 8, classes)
    said_NC = np.zeros((8, classes))
    said_NC[np.arange(told), rng.integers(0, classes, told)] = 1
    verdict = judge(old, new)
    decided = by_corrections(verdict, old.local_NC, new.local_NC, said_NC)
    if told < FEWEST_CORRECTIONS:
        assert decided == verdict
        return
    shares = [float((each.local_NC * said_NC).sum() / told) for each in (old, new)]
    assert decided.accept == (shares[1] >= shares[0]) and decided.decided_by == CORRECTIONS
    assert [decided.old[CORRECTIONS], decided.new[CORRECTIONS]] == pytest.approx(shares, abs=1e-5)
    assert f"of {told} clips that you corrected" in decided.reason
    truth = by_corrections(verdict, old.local_NC, np.where(said_NC.any(axis=1, keepdims=True), said_NC, 0), said_NC)  # type: ignore[arg-type]
    assert truth.accept, "nothing beats the truth"
