"""The device's choice between cloud and own answer, replayed on links: scripted ones, and recorded uplinks by path.

Every clip is sent, answered and chosen for in simulated time, with the policy of the device and the link model of
``isthmus link``. An oracle asks the cloud at every clip with the smallest frame, over a connection that never has to be
opened again, and knows which answers come in time: no policy can have more clips answered by the cloud.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.edge.link import controller
from isthmus.edge.link.compression import Policy, Setting, make_policy
from isthmus.edge.link.controller import LinkHistory
from isthmus.link.model import Direction, LinkState, Phase, Trace, transmit
from isthmus.proto.keepalive import CONNECT_TIMEOUT_S, PING_AFTER_S, PING_TIMEOUT_S, RECONNECT_MOST_S
from isthmus.proto.messages import NumberType, PublicMeasure

RATIOS: Final = (1.0, 2.0, 3.0)
MEASURED: Final = PublicMeasure(500, 0.60, 0.5, (), (0.66, 0.655, 0.65))
"""A student whose cloud is worth asking: own head 60 %, cloud 66, 65.5 and 65 % by ratio."""
SHARE_OF_ORACLE: Final = 0.97
BACK_WITHIN_S: Final = 10.0
_SHAKE_BYTES: Final = 300
_OVERHEAD_BYTES: Final = 60
"""Bytes of a frame or an answer on the wire beyond the features: HTTP/2, TCP and IP."""
_ANSWER_BYTES: Final = 120
_SERVER_S: Final = 0.005


@dataclass(frozen=True)
class World:
    """A link in both directions. ``note``: what it is like."""

    name: str
    up: Direction
    down: Direction
    note: str


@dataclass(frozen=True)
class Outcome:
    """The result of one policy on one link. Times in seconds; shares of all clips.

    ``back_s``: the longest time from the end of an outage to the next answer of the cloud in time. ``latest_s``: the
    longest time from a clip to its answer.
    """

    clips: int
    cloud_share: float
    late_share: float
    accuracy: float
    up_bytes: int
    latest_s: float
    back_s: float


def worlds(seed: int, duration_s: float) -> list[World]:
    """Return scripted links of the kinds that devices meet; outages and rates are drawn with the seed."""
    rng = random.Random(seed)

    def phases(good: Callable[[], Phase], bad: Callable[[], Phase]) -> tuple[Phase, ...]:
        made: list[Phase] = []
        while sum(each.for_s for each in made) < duration_s:
            made += [good(), bad()]
        return tuple(made)

    def radio(rate: float, delay_s: float, jitter_s: float, every_s: float, least_s: float, most_s: float) -> Direction:
        """Good times of ``every_s`` on average; outages between the bounds, short ones more often."""

        def outage() -> Phase:
            return Phase(min(most_s, least_s * rng.paretovariate(1.2)), stall=True)

        def good() -> Phase:
            return Phase(
                max(1.0, rng.expovariate(1 / every_s)),
                rate_bytes_s=rate * rng.uniform(0.5, 1.5),
                delay_s=delay_s,
                jitter_s=jitter_s,
            )

        return Direction(phases(good, outage), repeat=True)

    def down(delay_s: float, jitter_s: float) -> Direction:
        return Direction((Phase(delay_s=delay_s, jitter_s=jitter_s),))

    slow = Direction((Phase(rate_bytes_s=4_000, delay_s=0.05, jitter_s=0.02),))
    tunnel = Direction((Phase(for_s=60, rate_bytes_s=200_000, delay_s=0.03), Phase(for_s=45, stall=True)), repeat=True)
    lost = Direction(
        (
            Phase(for_s=90, rate_bytes_s=200_000, delay_s=0.03, jitter_s=0.02),
            Phase(for_s=0.5, half_open=True, delay_s=0.03),
        ),
        repeat=True,
    )
    return [
        World("lte", radio(600_000, 0.03, 0.04, 45, 0.3, 8), down(0.02, 0.02), "quick, with rare outages"),
        World("umts", radio(60_000, 0.06, 0.08, 20, 0.5, 12), down(0.05, 0.04), "outages each 20 s"),
        World("evdo", radio(25_000, 0.07, 0.1, 12, 0.5, 20), down(0.05, 0.05), "outages each 12 s, slow"),
        World("tunnel", tunnel, down(0.03, 0.0), "45 s without a link after each minute"),
        World("slow", slow, down(0.05, 0.02), "4 kB per second: only small frames are in time"),
        World("forgetful", lost, down(0.03, 0.02), "each 90 s the connection is lost without a word"),
    ]


def held_out_worlds(seed: int, duration_s: float) -> list[World]:
    """Return links of other kinds, which were drawn after the controller's constants were fixed.

    None of them uses the generator of ``worlds``: outages are of other lengths and come in bursts, rates wander instead
    of being drawn again, packets are lost, queues fill, and one way is worse than the other.
    """
    rng = random.Random(f"held out {seed}")

    def lasting(*made: Callable[[], Phase]) -> Direction:
        phases: list[Phase] = []
        while sum(each.for_s for each in phases) < duration_s:
            phases += [each() for each in made]
        return Direction(tuple(phases), repeat=True)

    def wandering(rate: float, delay_s: float) -> Direction:
        """A rate that doubles or halves slowly, as somebody walks through a building."""
        level = rate

        def phase() -> Phase:
            nonlocal level
            level = min(4 * rate, max(rate / 8, level * math.exp(rng.gauss(0.0, 0.4))))
            return Phase(rng.uniform(0.5, 2.5), rate_bytes_s=level, delay_s=delay_s, jitter_s=0.03)

        return lasting(phase)

    def handovers() -> Direction:
        """A train: quiet for minutes, then several short gaps within seconds."""

        def quiet() -> Phase:
            return Phase(rng.uniform(30, 150), rate_bytes_s=150_000, delay_s=0.04, jitter_s=0.03)

        def gap() -> Phase:
            return Phase(rng.uniform(0.2, 2.5), stall=True)

        def between() -> Phase:
            return Phase(rng.uniform(0.3, 3.0), rate_bytes_s=50_000, delay_s=0.08, jitter_s=0.06)

        return lasting(quiet, gap, between, gap, between, gap)

    def shared_line() -> Direction:
        """Others upload now and then: the queue before the modem adds a delay that most answers do not survive."""

        def free() -> Phase:
            return Phase(rng.uniform(20, 90), rate_bytes_s=120_000, delay_s=0.03, jitter_s=0.01)

        def full() -> Phase:
            return Phase(rng.uniform(5, 40), rate_bytes_s=15_000, delay_s=rng.uniform(0.15, 0.45), jitter_s=0.05)

        return lasting(free, full)

    def down(delay_s: float, jitter_s: float) -> Direction:
        return Direction((Phase(delay_s=delay_s, jitter_s=jitter_s),))

    lossy = Direction((Phase(rate_bytes_s=300_000, delay_s=0.03, jitter_s=0.02, loss=0.06),))
    far = Direction((Phase(rate_bytes_s=500_000, delay_s=0.30, jitter_s=0.02),))
    up = Direction((Phase(rate_bytes_s=250_000, delay_s=0.03, jitter_s=0.02),))
    return [
        World("walking", wandering(40_000, 0.04), down(0.03, 0.02), "the rate wanders between 5 and 160 kB/s"),
        World("train", handovers(), down(0.03, 0.02), "quiet for minutes, then gaps in bursts"),
        World("shared", shared_line(), down(0.03, 0.02), "a queue that others fill adds 150 to 450 ms"),
        World("lossy", lossy, down(0.03, 0.02), "6 % of packets are sent twice"),
        World("satellite", far, down(0.28, 0.02), "580 ms there and back: no answer is in time"),
        World("way back", up, handovers(), "the answers' way has the train's gaps"),
    ]


def recorded(path: Path, trace: Trace) -> World:
    """Return the world of a recorded uplink, with an undisturbed way back."""
    up = Direction((Phase(trace=trace, delay_s=0.02),))
    return World(path.stem, up, Direction((Phase(delay_s=0.02),)), "recorded")


Decide = Callable[[LinkHistory, Setting | None, float], Setting | None]


@dataclass
class _Wire:
    """The device's connection in simulated time."""

    world: World
    seed: int
    immortal: bool
    up: LinkState = field(default_factory=LinkState)
    down: LinkState = field(default_factory=LinkState)
    connected: bool = True
    lost_s: float = math.inf
    attempt_s: float = math.inf
    pause_s: float = 0.2

    def __post_init__(self) -> None:
        self._losses = _half_open_at(self.world)
        self._next_loss_s = next(self._losses, math.inf)

    def pass_on(self, now_s: float, size_bytes: int) -> float:
        """Return when the answer to a frame that is sent now arrives; infinity if the connection is dead."""
        if self.lost_s <= now_s:
            return math.inf
        self.up, there_s = transmit(self.world.up, self.up, now_s, size_bytes, key=f"{self.seed}/up")
        if not math.isfinite(there_s):
            return math.inf
        self.down, back_s = transmit(
            self.world.down, self.down, there_s + _SERVER_S, _ANSWER_BYTES + _OVERHEAD_BYTES, key=f"{self.seed}/down"
        )
        return math.inf if back_s > self._next_loss_s and not self.immortal else back_s

    def renew(self, now_s: float) -> None:
        """Drop the connection and begin to open another one."""
        self.connected, self.attempt_s, self.pause_s = False, now_s, 0.2

    def advance(self, now_s: float, heard_s: float, waiting: bool) -> bool:
        """Let keepalive and reconnecting happen up to ``now_s``. Return whether the connection broke just now."""
        if self.immortal:
            return False
        while self._next_loss_s <= now_s:
            if self.connected:
                self.lost_s = min(self.lost_s, self._next_loss_s)
            self._next_loss_s = next(self._losses, math.inf)
        if self.connected:
            if waiting and now_s - heard_s >= PING_AFTER_S + PING_TIMEOUT_S:
                self.renew(now_s)
                return True
            return False
        while self.attempt_s <= now_s:
            # A connection is two packets there and one back; the first bytes of an attempt carry the same queue.
            self.lost_s = math.inf
            open_s = self.pass_on(self.attempt_s, _SHAKE_BYTES)
            if open_s <= self.attempt_s + CONNECT_TIMEOUT_S:
                if open_s <= now_s:
                    self.connected = True
                    self.attempt_s = math.inf
                return False
            self.pause_s = min(RECONNECT_MOST_S, 1.6 * self.pause_s)
            self.attempt_s += CONNECT_TIMEOUT_S + self.pause_s
        return False


def simulate(
    world: World,
    decide: Decide,
    policy: Policy,
    *,
    seed: int,
    duration_s: float,
    every_s: float,
    own_s: float = 0.02,
    immortal: bool = False,
    hedged: bool = True,
) -> Outcome:
    """Answer a clip each ``every_s`` and return what came of it.

    ``own_s``: time of the own answer. ``immortal``: the connection never has to be opened again. Without ``hedged`` a
    clip whose cloud answer is late has no answer.
    """
    rng = random.Random(seed)
    budget_s = policy.latency_budget_s
    wire = _Wire(world, seed, immortal)
    history, current = LinkHistory(), None
    answers: list[tuple[float, int]] = []
    accuracy_of = dict(zip(RATIOS, MEASURED.ratio_accuracies, strict=True))
    cloud = late = up_bytes = 0
    right = latest_s = 0.0
    in_time_at: list[float] = []
    clips = int(duration_s / every_s)
    for number in range(clips):
        now_s = (number + 0.5 + 0.3 * rng.random()) * every_s
        while answers and answers[0][0] <= now_s:
            at_s, sequence = answers.pop(0)
            history = controller.arrived(history, sequence, at_s)
        heard_s = max(history.heard_s, history.in_flight[0].sent_s if history.in_flight else 0.0)
        if wire.advance(now_s, heard_s, bool(history.in_flight)):
            history, answers = controller.broke(history, now_s, rng.random()), []
        if controller.is_stuck(history, now_s) and not immortal:
            history, answers = controller.renewed(history, now_s), []
            wire.renew(now_s)
        setting = decide(history, current, now_s)
        current = setting or current
        answered_s, score = own_s, MEASURED.accuracy
        if setting is not None and not wire.connected and not wire.immortal:
            history = controller.broke(history, now_s, rng.random())
        elif setting is not None:
            history = controller.sent(history, number, setting.frame_bytes, now_s)
            up_bytes += setting.frame_bytes + _OVERHEAD_BYTES
            back_s = wire.pass_on(now_s, setting.frame_bytes + _OVERHEAD_BYTES)
            answered_s = min(back_s - now_s, budget_s)
            if back_s <= now_s + budget_s:
                cloud += 1
                score = accuracy_of[setting.ratio]
                in_time_at.append(now_s)
            else:
                late += 1
                score = score if hedged else 0.0
            if math.isfinite(back_s):
                answers.append((back_s, number))
        right += score
        latest_s = max(latest_s, answered_s)
    return Outcome(
        clips,
        cloud / clips,
        late / clips,
        right / clips,
        up_bytes,
        latest_s,
        _longest_wait_s(world.up, in_time_at, duration_s),
    )


def compare(world: World, *, seed: int, duration_s: float, every_s: float, budget_s: float) -> dict[str, Any]:
    """Return what the device's policy, fixed choices and the oracle make of a link, and whether the bounds hold."""
    policy = make_policy(512, RATIOS, tuple(NumberType), budget_s)
    worth = controller.worths(policy, MEASURED, RATIOS)
    smallest, largest = policy.settings[-1], policy.settings[0]

    def ours(history: LinkHistory, current: Setting | None, now_s: float) -> Setting | None:
        return controller.decide(policy, history, worth, current, budget_s, now_s).setting

    def run(decide: Decide, **options: bool) -> Outcome:
        return simulate(world, decide, policy, seed=seed, duration_s=duration_s, every_s=every_s, **options)

    outcomes = {
        "device": run(ours),
        "oracle": run(lambda history, current, now_s: smallest, immortal=True),
        "always cloud": run(lambda history, current, now_s: largest, hedged=False),
        "never cloud": run(lambda history, current, now_s: None),
    }
    device, oracle = outcomes["device"], outcomes["oracle"]
    share = device.cloud_share / oracle.cloud_share if oracle.cloud_share else 1.0
    return {
        "link": world.name,
        "note": world.note,
        "outcomes": {name: asdict(each) for name, each in outcomes.items()},
        "share_of_oracle": share,
        "holds": {
            "every clip in its budget": device.latest_s <= budget_s,
            f"{SHARE_OF_ORACLE} of the oracle": share >= SHARE_OF_ORACLE,
            "no worse than always or never": device.accuracy
            >= max(outcomes["always cloud"].accuracy, outcomes["never cloud"].accuracy) - 1e-9,
            f"back within {BACK_WITHIN_S:g} s": device.back_s <= max(BACK_WITHIN_S, oracle.back_s),
        },
    }


def run(
    out: Path,
    traces: Sequence[tuple[Path, Trace]],
    *,
    seeds: int,
    duration_s: float,
    every_s: float,
    budget_s: float,
    held_out: bool = False,
) -> dict[str, Any]:
    """Compare on every link and seed, and write the result to ``out`` as JSON.

    ``held_out``: on links of kinds that the controller's constants were not chosen on.
    """
    make = held_out_worlds if held_out else worlds
    rows = []
    for seed in range(seeds):
        for world in (*make(seed, duration_s), *(recorded(*each) for each in traces if seed == 0)):
            row = compare(world, seed=seed, duration_s=duration_s, every_s=every_s, budget_s=budget_s)
            rows.append({**row, "seed": seed})
    config = {"seeds": seeds, "duration_s": duration_s, "every_s": every_s, "budget_s": budget_s, "held_out": held_out}
    result = {"config": config, "student": asdict(MEASURED), "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def table(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table: link and seed, shares, accuracies, seconds, and which bounds do not hold."""
    for row in result["rows"]:
        of = row["outcomes"]
        yield (
            f"{row['link']} {row['seed']}",
            f"{of['device']['cloud_share']:.1%}",
            f"{of['oracle']['cloud_share']:.1%}",
            f"{row['share_of_oracle']:.3f}",
            " / ".join(f"{of[name]['accuracy']:.3f}" for name in ("device", "always cloud", "never cloud")),
            f"{of['device']['latest_s']:.3f}",
            f"{of['device']['back_s']:.1f}",
            ", ".join(name for name, holds in row["holds"].items() if not holds) or "-",
        )


def _longest_wait_s(up: Direction, in_time_at: Sequence[float], duration_s: float) -> float:
    """Return the longest time from the end of an outage to the next answer in time, or to the next outage."""
    longest, position = 0.0, 0
    starts = up.starts()
    stalled = False
    for start_s, phase in starts:
        if start_s > duration_s:
            break
        ended = stalled and not phase.stall
        stalled = phase.stall
        if not ended:
            continue
        while position < len(in_time_at) and in_time_at[position] < start_s:
            position += 1
        answered_s = in_time_at[position] if position < len(in_time_at) else duration_s
        longest = max(longest, min(answered_s, start_s + phase.for_s, duration_s) - start_s)
    return longest


def _half_open_at(world: World) -> Iterator[float]:
    """Yield the times at which present connections are lost, in order."""
    if not any(phase.half_open for phase in world.up.phases):
        return
    for start_s, phase in world.up.starts():
        if phase.half_open:
            yield start_s
