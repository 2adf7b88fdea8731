"""Choice of the compression for the present link. Pure: measurements in, a setting out.

The choice is the least compressed setting whose predicted latency meets the budget, with hysteresis. The clip is
answered locally if no setting meets it or the link is down.
Predicted latency = round trip + server time + frame bytes / throughput.
"""

from dataclasses import dataclass, replace

from isthmus.proto.codec import frame_bytes
from isthmus.proto.messages import NumberType

SMOOTHING = 0.25
"""Weight of a new measurement in the moving averages."""

MIN_THROUGHPUT_BYTES = 8 << 10
"""Smaller transfers are dominated by the round trip and do not measure throughput."""


@dataclass(frozen=True)
class LinkEstimate:
    """Smoothed measurements of the link; None before the first. ``server_s``: the cloud's own seconds per clip."""

    throughput_bytes_s: float | None = None
    round_trip_s: float | None = None
    server_s: float = 0.0


@dataclass(frozen=True)
class Setting:
    """A ratio and number type. ``frame_bytes``: for a clip with both modalities; a clip with one takes about half."""

    ratio: float
    number_type: NumberType
    frame_bytes: int


@dataclass(frozen=True)
class Policy:
    """``settings`` are ordered from least to most compressed.

    Hysteresis: a setting that is less compressed than the present one must meet ``(1 - margin)`` of the budget.
    Otherwise a link near the limit would change its setting at every clip.
    """

    settings: tuple[Setting, ...]
    latency_budget_s: float
    margin: float = 0.2


def make_policy(
    feature_width: int,
    ratios: tuple[float, ...],
    number_types: tuple[NumberType, ...],
    latency_budget_s: float,
    margin: float = 0.2,
) -> Policy:
    """Return a policy over every pair of ratio and number type, most bytes first; ties go to the lower ratio.

    Raises ValueError for no settings, a budget that is not positive or a margin outside [0, 1).
    """
    if not ratios or not number_types:
        raise ValueError("a policy needs at least one ratio and one number type")
    if not latency_budget_s > 0 or not 0 <= margin < 1:
        raise ValueError(f"latency budget {latency_budget_s} s with margin {margin}")
    settings = [
        Setting(ratio, number_type, frame_bytes(feature_width, ratio, number_type))
        for ratio in ratios
        for number_type in number_types
    ]
    settings.sort(key=lambda setting: (-setting.frame_bytes, setting.ratio))
    return Policy(tuple(settings), latency_budget_s, margin)


def observe_transfer(estimate: LinkEstimate, sent_bytes: int, elapsed_s: float) -> LinkEstimate:
    """Return the estimate after a bulk transfer. A transfer that is too small changes nothing."""
    busy_s = elapsed_s - (estimate.round_trip_s or 0.0)
    if sent_bytes < MIN_THROUGHPUT_BYTES or busy_s <= 0:
        return estimate
    return replace(estimate, throughput_bytes_s=_smoothed(estimate.throughput_bytes_s, sent_bytes / busy_s))


def observe_answer(estimate: LinkEstimate, sent_bytes: int, elapsed_s: float, server_s: float) -> LinkEstimate:
    """Return the estimate after one answer. The round trip is the time that neither server nor transfer took."""
    wire_s = sent_bytes / estimate.throughput_bytes_s if estimate.throughput_bytes_s else 0.0
    round_trip_s = max(0.0, elapsed_s - server_s - wire_s)
    return replace(
        estimate,
        round_trip_s=_smoothed(estimate.round_trip_s, round_trip_s),
        server_s=_smoothed(estimate.server_s or None, server_s),
    )


def predicted_s(estimate: LinkEstimate, setting: Setting) -> float:
    """Return the predicted latency of one clip in seconds. Unmeasured parts count as 0."""
    wire_s = setting.frame_bytes / estimate.throughput_bytes_s if estimate.throughput_bytes_s else 0.0
    return (estimate.round_trip_s or 0.0) + estimate.server_s + wire_s


def choose(policy: Policy, estimate: LinkEstimate, current: Setting | None, *, link_up: bool) -> Setting | None:
    """Return the setting for the next clip; None means that the clip is answered locally.

    ``current`` is the last choice (None: local, or no choice yet). Before any measurement the most compressed setting
    is chosen, because it loads an unknown link least. For the same ``current``, a better link (more throughput, less
    round trip and server time) never gives a more compressed setting.
    """
    if not link_up:
        return None
    if estimate.round_trip_s is None:
        return policy.settings[-1]
    present_bytes = current.frame_bytes if current is not None else 0
    for setting in policy.settings:
        easing = setting.frame_bytes > present_bytes
        budget_s = policy.latency_budget_s * (1 - policy.margin if easing else 1)
        if predicted_s(estimate, setting) <= budget_s:
            return setting
    return None


def _smoothed(average: float | None, value: float) -> float:
    return value if average is None else average + SMOOTHING * (value - average)
