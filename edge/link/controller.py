"""Cloud or own answer, and at which setting, from what the link has done so far. Pure: data in, a choice out.

The own answer is always computed, so asking the cloud costs bytes and nothing else. The cloud is asked if

    P(answer within the budget) * worth > price * bytes

for some setting. ``worth`` is by how much the cloud's answer is more accurate than the own one; the student's manifest
says it. Only settings count whose P is hardly below that of the smallest frame, and of these the one of the highest
value (the difference of both sides) is chosen.

P has two factors. The first is the share of recent answers that would have been in time at this setting; older ones
count less. The second is about silence: if answers are overdue for a seconds, the link may be gone. Outages of mobile
links have no typical length, so the chance that one ends within the next b seconds is taken as b / (a + b), that of a
Pareto distribution of shape 1.

An answer that comes too late is not waited for, but it is counted: it moves the first factor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from isthmus.edge.link.compression import Policy, Setting
from isthmus.proto.messages import NumberType, PublicMeasure

MOST_SAMPLES = 64
HALF_LIFE_S = 60.0
"""A sample of this age counts half."""
PRIOR, PRIOR_WEIGHT = 0.8, 0.5
"""The share of answers in time before anything is known, and how many answers this counts for."""
INDIRECT = 0.3
"""How much an answer to a frame of another size counts if the time per byte is needed to conclude from it."""
BYTE_TIME_HALF_LIFE_S = 300.0
"""The measured time per byte halves in this time without a new measurement, so that larger frames are tried again."""
MOST_IN_FLIGHT = 64
"""With more unanswered frames nothing is sent."""
STUCK_S, STUCK_MOST_S = 2.0, 12.0
"""A connection that owes an answer for so long is replaced; the time doubles until an answer comes.

Keepalive needs seven times as long. TCP sends again after pauses that double, so a fresh
connection often hears first when an outage ends.
"""
REOPEN_FIRST_S, REOPEN_MOST_S = 0.1, 1.0
"""Pauses before a stream is opened again. Connecting has pauses of its own (isthmus.proto.keepalive)."""

UNKNOWN_WORTH = 0.02
"""Assumed worth of the cloud's answer at ratio 1 if the student's manifest does not say it."""
WORTH_PER_DOUBLING = 0.002
"""Assumed loss of worth per doubling of the ratio, in the same case."""
NUMBER_TYPE_LOSS = {NumberType.FP32: 0.0, NumberType.FP16: 0.0, NumberType.INT8: 0.001}
"""Accuracy that a number type costs. The manifest's accuracies are those of float32."""
PRICE_PER_KIB = 0.0002
"""Accuracy that one KiB must be worth."""
HARDLY = 0.985
"""A setting counts if its probability is at least this share of the smallest frame's."""
EASING = 1.05
"""A setting replaces the present one only if its value is higher by this factor."""


@dataclass(frozen=True)
class Sample:
    """One answer: its frame's bytes, the seconds that it took (infinity: lost), and when it arrived or was given up."""

    frame_bytes: int
    elapsed_s: float
    at_s: float


@dataclass(frozen=True)
class InFlight:
    sequence: int
    frame_bytes: int
    sent_s: float


@dataclass(frozen=True)
class LinkHistory:
    """What is known of the link. ``samples``: oldest first. ``heard_s``: the last answer's time.

    ``byte_s``: seconds per byte of a frame, and ``byte_at_s`` when they were measured. ``reopen_at_s``: not before this
    time a stream is opened; ``failures`` and ``renewals``: streams that broke, and connections that were replaced,
    since the last answer.
    """

    samples: tuple[Sample, ...] = ()
    in_flight: tuple[InFlight, ...] = ()
    heard_s: float = -math.inf
    byte_s: float = 0.0
    byte_at_s: float = 0.0
    reopen_at_s: float = -math.inf
    failures: int = 0
    renewals: int = 0


@dataclass(frozen=True)
class Choice:
    """``setting`` None: the device answers alone. ``probability``: of an answer in time, at the best setting."""

    setting: Setting | None
    probability: float = 0.0


def worths(policy: Policy, measured: PublicMeasure | None, ratios: Sequence[float]) -> tuple[float, ...]:
    """Return for each setting by how much the cloud's answer is more accurate than the device's own.

    ``ratios``: those of the student, in the order of ``measured.ratio_accuracies``.
    """
    if measured is not None and measured.ratio_accuracies:
        of_ratio = {
            ratio: accuracy - measured.accuracy
            for ratio, accuracy in zip(ratios, measured.ratio_accuracies, strict=True)
        }
    else:
        of_ratio = {ratio: UNKNOWN_WORTH - WORTH_PER_DOUBLING * math.log2(ratio) for ratio in ratios}
    return tuple(of_ratio[each.ratio] - NUMBER_TYPE_LOSS[each.number_type] for each in policy.settings)


def sent(history: LinkHistory, sequence: int, frame_bytes: int, now_s: float) -> LinkHistory:
    return replace(history, in_flight=(*history.in_flight, InFlight(sequence, frame_bytes, now_s)))


def arrived(history: LinkHistory, sequence: int, at_s: float) -> LinkHistory:
    """Return the history after an answer, in time or late. An answer to an unknown frame changes nothing."""
    found = next((each for each in history.in_flight if each.sequence == sequence), None)
    if found is None:
        return history
    # Answers come in order, so what is still open before this one will never come.
    lost = [Sample(each.frame_bytes, math.inf, at_s) for each in history.in_flight if each.sequence < sequence]
    sample = Sample(found.frame_bytes, max(0.0, at_s - found.sent_s), at_s)
    rest = tuple(each for each in history.in_flight if each.sequence > sequence)
    after = replace(history, in_flight=rest, heard_s=max(history.heard_s, at_s), failures=0, renewals=0)
    return _measured(replace(after, samples=(*history.samples, *lost, sample)[-MOST_SAMPLES:]), at_s)


def broke(history: LinkHistory, now_s: float, jitter: float, *, not_before_s: float = 0.0) -> LinkHistory:
    """Return the history after the stream broke, or could not be opened.

    ``jitter`` is uniform in [0, 1). ``not_before_s``: the seconds after which a busy cloud asks to be tried again.
    """
    lost = [Sample(each.frame_bytes, math.inf, now_s) for each in history.in_flight]
    pause_s = min(REOPEN_MOST_S, REOPEN_FIRST_S * 2.0 ** min(history.failures, 16)) * (0.5 + 0.5 * jitter)
    return replace(
        history,
        samples=(*history.samples, *lost)[-MOST_SAMPLES:],
        in_flight=(),
        failures=history.failures + 1,
        reopen_at_s=now_s + max(pause_s, not_before_s * (1.0 + 0.5 * jitter)),
    )


def renewed(history: LinkHistory, now_s: float) -> LinkHistory:
    """Return the history after the device has replaced a connection that was stuck."""
    lost = [Sample(each.frame_bytes, math.inf, now_s) for each in history.in_flight]
    samples = (*history.samples, *lost)[-MOST_SAMPLES:]
    return replace(history, samples=samples, in_flight=(), renewals=history.renewals + 1)


def closed(history: LinkHistory) -> LinkHistory:
    """Return the history after the device closed the stream by itself: what is in flight says nothing."""
    return replace(history, in_flight=())


def assumed_rate(history: LinkHistory, bytes_per_s: float, now_s: float) -> LinkHistory:
    """Return the history with a rate that a download has shown, if no frame has shown one yet."""
    if history.byte_s or not bytes_per_s > 0:
        return history
    return replace(history, byte_s=1 / bytes_per_s, byte_at_s=now_s)


def overdue_s(history: LinkHistory, now_s: float) -> float:
    """Return for how long the oldest unanswered frame has been without any answer; 0 if nothing is in flight."""
    if not history.in_flight:
        return 0.0
    return max(0.0, now_s - max(history.in_flight[0].sent_s, history.heard_s))


def is_stuck(history: LinkHistory, now_s: float) -> bool:
    """Return whether the connection should be replaced, because an answer is overdue for long."""
    return overdue_s(history, now_s) > min(STUCK_MOST_S, STUCK_S * 2.0 ** min(history.renewals, 8))


def probability(history: LinkHistory, frame_bytes: int, budget_s: float, now_s: float) -> float:
    """Return the probability that a frame of this size, sent now, is answered within ``budget_s``."""
    if budget_s <= 0:
        return 0.0
    byte_s = _byte_s(history, now_s)
    weight, in_time = PRIOR_WEIGHT, PRIOR_WEIGHT * PRIOR
    for each in history.samples:
        in_time_itself = each.elapsed_s <= budget_s
        # A larger frame in time says that this one is, and a smaller one late that this one is not.
        direct = each.frame_bytes >= frame_bytes if in_time_itself else each.frame_bytes <= frame_bytes
        counts = _weight(each, now_s) * (1.0 if direct else INDIRECT)
        weight += counts
        if direct:
            in_time += counts if in_time_itself else 0.0
        elif each.elapsed_s + (frame_bytes - each.frame_bytes) * byte_s <= budget_s:
            in_time += counts
    silent_s = overdue_s(history, now_s) - budget_s
    alive = 1.0 if silent_s <= 0 else budget_s / (silent_s + budget_s)
    return alive * in_time / weight


def decide(
    policy: Policy, history: LinkHistory, worth: Sequence[float], current: Setting | None, budget_s: float, now_s: float
) -> Choice:
    """Return how the next clip is answered; ``worth`` is in the order of the policy's settings.

    ``budget_s``: what is left of the clip's time. ``current``: the last setting, which is kept if none is clearly
    better.
    """
    if now_s < history.reopen_at_s or len(history.in_flight) >= MOST_IN_FLIGHT:
        return Choice(None)
    best, best_value, best_p = None, 0.0, 0.0
    most = probability(history, policy.settings[-1].frame_bytes, budget_s, now_s)
    for setting, gain in zip(policy.settings, worth, strict=True):
        p = probability(history, setting.frame_bytes, budget_s, now_s)
        if gain <= 0 or p < HARDLY * most:
            continue
        value = p * gain - PRICE_PER_KIB * setting.frame_bytes / 1024
        if setting == current:
            value *= EASING
        if value > best_value:
            best, best_value, best_p = setting, value, p
    return Choice(best, best_p)


def _measured(history: LinkHistory, now_s: float) -> LinkHistory:
    """Take the time per byte from the quickest answers to the smallest and to the largest frames: outages hit both."""
    quickest: dict[int, float] = {}
    for each in history.samples:
        if math.isfinite(each.elapsed_s):
            quickest[each.frame_bytes] = min(each.elapsed_s, quickest.get(each.frame_bytes, math.inf))
    small, large = min(quickest), max(quickest)
    if large < 2 * small:
        return history
    byte_s = max(0.0, quickest[large] - quickest[small]) / (large - small)
    return replace(history, byte_s=byte_s, byte_at_s=now_s)


def _byte_s(history: LinkHistory, now_s: float) -> float:
    age_s = max(0.0, now_s - history.byte_at_s)
    return history.byte_s * math.exp2(-min(age_s / BYTE_TIME_HALF_LIFE_S, 64.0))


def _weight(sample: Sample, now_s: float) -> float:
    return math.exp2(-min(max(0.0, now_s - sample.at_s) / HALF_LIFE_S, 64.0))
