"""PURE: a model of a link: when does each packet of a direction arrive, and which of its bytes are damaged.

A direction is a list of phases. ``transmit`` takes the state of a direction, the time and a size, and returns the state
after it and the time of arrival. Random numbers are functions of the seed and of a counter, so the same packets at the
same times arrive at the same times again.

The link is one queue per direction, shared by all connections, and never reorders. Time is in seconds from the start of
the script.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from typing import Final

PACKET_BYTES: Final = 1_500
"""Bytes of one packet, and of one line of a packet-delivery trace."""
RETRANSMIT_S: Final = 0.2
"""TCP waits at least this long before it sends a lost packet again (the minimum that Linux uses)."""
_MOST_LOSSES: Final = 12


@dataclass(frozen=True)
class Trace:
    """A packet-delivery trace: at each of ``at_s`` (ascending) up to PACKET_BYTES may leave. It repeats.

    The last time is also the length of the trace, as in Mahimahi (Netravali et al., USENIX ATC 2015, section 4.1).
    Raises ValueError for an empty trace, and for one that does not ascend or lasts no time.
    """

    at_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.at_s or self.at_s[-1] <= 0 or self.at_s[0] < 0:
            raise ValueError("a trace needs at least one line, and must last longer than 0 ms")
        if any(later < earlier for earlier, later in zip(self.at_s, self.at_s[1:], strict=False)):
            raise ValueError("the times of a trace must ascend")

    def opportunity(self, number: int) -> float:
        """Return the time of the opportunity with this number, counted over all repetitions."""
        turns, place = divmod(number, len(self.at_s))
        return turns * self.at_s[-1] + self.at_s[place]

    def first_at(self, time_s: float) -> int:
        """Return the number of the first opportunity at or after ``time_s``."""
        turns = int(time_s // self.at_s[-1])
        within_s = time_s - turns * self.at_s[-1]
        return turns * len(self.at_s) + bisect_left(self.at_s, within_s)


@dataclass(frozen=True)
class Phase:
    """A stretch of time in which a direction behaves in one way.

    ``for_s``: its length. ``rate_bytes_s``: None means no limit. ``trace``: a packet-delivery trace in place of a rate.
    ``delay_s``: added to every packet, with a uniform share of ``jitter_s``. ``loss``: the share of packets that TCP
    has to send again. ``stall``: nothing leaves; bytes wait. ``half_open``: connections that are open at the start of
    the phase swallow everything from then on, and do not recover. ``cut``: they are cut at the start of the phase.
    ``corrupt_every_bytes``: the mean distance of damaged bytes (0: none).

    A connection that is opened in this phase: ``refuse`` closes it at once, ``connect_delay_s`` makes it slow to open,
    ``cut_every_bytes`` cuts it after a random number of bytes with this mean, ``cut_at_byte`` after exactly that many,
    one number per connection in the order in which they open; with a single number it holds for each.
    """

    for_s: float = math.inf
    rate_bytes_s: float | None = None
    trace: Trace | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    stall: bool = False
    half_open: bool = False
    cut: bool = False
    corrupt_every_bytes: float = 0.0
    refuse: bool = False
    connect_delay_s: float = 0.0
    cut_every_bytes: float = 0.0
    cut_at_byte: int | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Direction:
    """The phases of one direction, in order; after the last one ``repeat`` begins again, else the last one goes on.

    Raises ValueError for no phases and for values that cannot be.
    """

    phases: tuple[Phase, ...] = (Phase(),)
    repeat: bool = False
    ends_s: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a direction needs at least one phase")
        for number, phase in enumerate(self.phases, 1):
            _check(phase, f"phase {number}")
            if not math.isfinite(phase.for_s) and (self.repeat or number < len(self.phases)):
                raise ValueError(f"phase {number} never ends: give it for_s")
        object.__setattr__(self, "ends_s", tuple(accumulate(phase.for_s for phase in self.phases)))

    def at(self, time_s: float) -> tuple[int, Phase, float]:
        """Return the number of the phase at ``time_s`` over all repetitions, the phase, and the time at which it ends.

        The last phase of a direction that does not repeat ends at infinity.
        """
        turns, within_s = 0, time_s
        if self.repeat:
            turns = int(time_s // self.ends_s[-1])
            within_s = time_s - turns * self.ends_s[-1]
        place = next((index for index, end_s in enumerate(self.ends_s) if within_s < end_s), len(self.phases) - 1)
        last = not self.repeat and place == len(self.phases) - 1
        end_s = math.inf if last else turns * (self.ends_s[-1] if self.repeat else 0.0) + self.ends_s[place]
        if end_s <= time_s:  # The floating-point remainder fell on the wrong side of a boundary.
            return self.at(math.nextafter(time_s, math.inf))
        return turns * len(self.phases) + place, self.phases[place], end_s

    def starts(self) -> Iterator[tuple[float, Phase]]:
        """Yield (start, phase) in order, without end if the direction repeats."""
        turn = 0
        while True:
            for index, phase in enumerate(self.phases):
                before_s = self.ends_s[index - 1] if index else 0.0
                yield turn * (self.ends_s[-1] if self.repeat else 0.0) + before_s, phase
            if not self.repeat:
                return
            turn += 1


@dataclass(frozen=True)
class LinkState:
    """What a direction remembers. ``free_at_s``: the last packet has left. ``arrived_s``: when it arrives.

    ``packets``: how many there were. ``opportunity`` and ``used_bytes``: the place in a trace.
    """

    free_at_s: float = 0.0
    arrived_s: float = 0.0
    packets: int = 0
    opportunity: int = 0
    used_bytes: int = 0


def transmit(
    direction: Direction, state: LinkState, now_s: float, size_bytes: int, *, key: str
) -> tuple[LinkState, float]:
    """Return the state after a packet of ``size_bytes`` that is sent now, and when it arrives (infinity: never).

    ``key`` names the source of random numbers: the script's seed and the direction.
    """
    leaves_s, state = _leaves(direction, state, max(now_s, state.free_at_s), size_bytes)
    state = replace(state, free_at_s=leaves_s, packets=state.packets + 1)
    if not math.isfinite(leaves_s):
        return replace(state, arrived_s=math.inf), math.inf
    phase = direction.at(leaves_s)[1]
    delay_s = phase.delay_s + phase.jitter_s * uniform(key, "jitter", state.packets)
    wait_s = max(RETRANSMIT_S, 2 * phase.delay_s)
    for attempt in range(_MOST_LOSSES):
        if not phase.loss or uniform(key, "loss", state.packets, attempt) >= phase.loss:
            break
        delay_s += wait_s
        wait_s *= 2
    arrives_s = max(state.arrived_s, leaves_s + delay_s)
    return replace(state, arrived_s=arrives_s), arrives_s


def _leaves(direction: Direction, state: LinkState, time_s: float, size_bytes: int) -> tuple[float, LinkState]:
    """Return when the last byte of a packet leaves whose first byte may leave at ``time_s``."""
    left = float(size_bytes)
    fruitless = 0
    while math.isfinite(time_s):
        _, phase, end_s = direction.at(time_s)
        before = left
        if not phase.stall:
            if phase.trace is not None:
                done_s, left, state = _through_trace(phase.trace, state, time_s, end_s, left)
                if left <= 0:
                    return done_s, state
            elif phase.rate_bytes_s is None or left <= phase.rate_bytes_s * (end_s - time_s):
                return time_s + (0.0 if phase.rate_bytes_s is None else left / phase.rate_bytes_s), state
            else:
                left -= phase.rate_bytes_s * (end_s - time_s)
        fruitless = fruitless + 1 if left == before else 0
        if fruitless > len(direction.phases) + 1:
            break  # A whole turn, and nothing left: nothing ever will.
        time_s = end_s
    return math.inf, state


def _through_trace(
    trace: Trace, state: LinkState, time_s: float, end_s: float, left: float
) -> tuple[float, float, LinkState]:
    """Use the opportunities of [time_s, end_s) for ``left`` bytes. Return the last time, what is left, the state."""
    number, used = trace.first_at(time_s), 0
    if state.opportunity >= number:  # The packet before ended in this opportunity, and may have left some of it.
        number, used = state.opportunity, state.used_bytes
    done_s = time_s
    while left > 0:
        at_s = trace.opportunity(number)
        if at_s >= end_s:
            break
        room = PACKET_BYTES - used
        if room:
            taken = min(room, left)
            left -= taken
            used += int(taken)
            done_s = max(done_s, at_s)
        if left > 0:
            number, used = number + 1, 0
    return done_s, left, replace(state, opportunity=number, used_bytes=used)


def next_distance(mean_bytes: float, key: str, number: int) -> int:
    """Return a number of bytes, at least 1, from the geometric distribution with this mean."""
    if mean_bytes <= 1:
        return 1
    return 1 + int(math.log(1.0 - uniform(key, "distance", number)) / math.log(1.0 - 1.0 / mean_bytes))


def uniform(*key: object) -> float:
    """Return a number in [0, 1) that is a function of the key alone."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _check(phase: Phase, name: str) -> None:
    if not phase.for_s > 0:
        raise ValueError(f"{name}: for_s must be above 0, not {phase.for_s:g}")
    if phase.rate_bytes_s is not None and not phase.rate_bytes_s > 0:
        raise ValueError(f"{name}: rate_bytes_s must be above 0; 'stall: true' stops the link")
    if phase.rate_bytes_s is not None and phase.trace is not None:
        raise ValueError(f"{name}: give a rate or a trace, not both")
    if not 0 <= phase.loss < 1:
        raise ValueError(f"{name}: loss is a share from 0 to below 1, not {phase.loss:g}")
    numbers = ("delay_s", "jitter_s", "corrupt_every_bytes", "connect_delay_s", "cut_every_bytes")
    for each in numbers:
        value = getattr(phase, each)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: {each} must be a number from 0 on, not {value:g}")
    cuts = phase.cut_at_byte
    for at in (cuts,) if isinstance(cuts, int) else cuts or ():
        if at < 0:
            raise ValueError(f"{name}: cut_at_byte must be 0 or more, not {at}")
