"""A day in the life of a device: 24 simulated hours with link faults, restarts, updates and jumps of the clock.

What runs is the real loop of ``isthmus edge run`` with the real agent, answers, store, outbox and budget, on a real
folder. Simulated are time, camera and microphone, and the link to a cloud in memory. Threads take turns in simulated
time, so a seed gives the same day again.

A person comes and goes, asks for a personalisation now and then, and takes the microphone's clips as they come. The
device's process is killed at any moment and started again; the clock of the day jumps a day ahead and back. The link is
good, late, slow, silent, half-open, cut or gone. Some students that the cloud offers are broken.

Checked: every clip with a person is answered once and within its budget, but for the one in hand when a process is
killed; every answer of the cloud is given to the clip that asked; each upload is applied once and never differs; the
rounds and the epsilon that the person allows are kept.
"""

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Final
from unittest.mock import patch

import numpy as np
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.data.clip import ClipRef, DecodedClip
from isthmus.data.transforms import spectrogram
from isthmus.edge.agent import live
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.life import Life
from isthmus.edge.agent.live import LiveAnswer
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.capture.process import NOBODY, Captured
from isthmus.edge.capture.sources import Taken
from isthmus.edge.commands import living
from isthmus.edge.commands.options import RunOptions
from isthmus.edge.link.sent import SentMessages
from isthmus.edge.own_clips.store import ClipStore, Limits, StoredSelection
from tests.bench.harness import Report
from tests.conftest import TinyStudents
from tests.rigs.edge.device import load_test
from tests.rigs.edge.simulated_link import FaultyCalls, Seen, make_cloud, make_link
from tests.rigs.edge.turns import Killed, Turns, turning_worker

DAY_S: Final = 86_400.0
BUDGET_S: Final = 0.3
"""Within which a clip is to be answered."""
EPSILON: Final = 12.0
ROUNDS: Final = 2
EVERY_S: Final = 10.0
"""From clip to clip, unless a measurement asks for another time."""


class Room:
    """A capture in simulated time: a person is there for some hours, and every clip has a voice."""

    def __init__(
        self, runtime: Runtime, turns: Turns, presence: Callable[[float], bool], every_s: float, seen: Seen
    ) -> None:
        self.runtime, self.turns, self.presence, self.every_s, self.seen = runtime, turns, presence, every_s, seen

    def __call__(self, *positional: object, **options: object) -> "Room":
        return self

    def __enter__(self) -> "Room":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def next_clip(self, name: str) -> Captured:
        self.turns.sleep(self.every_s)
        if not self.presence(self.turns.now_s):
            return Captured(None, NOBODY)
        spec = self.runtime.spec
        rng = np.random.default_rng(len(self.seen.captured))
        sound_T = rng.uniform(-0.5, 0.5, spec.samples).astype(np.float32) * rng.uniform(0.1, 1.0)
        self.seen.captured.append(name)
        self.seen.in_hand = [name]
        clip = DecodedClip(spectrogram(sound_T, spec), None)
        return Captured(Taken(ClipRef(name, None, None, None, None), clip, 0.0), "", sound_T, None)


class Watched(Life):
    """A life that counts its answers, and when they came."""

    def __init__(self, sent: SentMessages, turns: Turns, seen: Seen) -> None:
        super().__init__(sent)
        self.turns, self.seen = turns, seen
        self.captured_s = 0.0

    def answered(self, result: LiveAnswer, *positional: Any, **facts: Any) -> None:
        seen = self.seen
        seen.answered.append(result.name)
        seen.by_cloud += result.setting is not None
        seen.slowest_s = max(seen.slowest_s, self.turns.now_s - self.captured_s)
        seen.in_hand = []
        super().answered(result, *positional, **facts)


@contextmanager
def simulated(turns: Turns, room: Room) -> Iterator[None]:
    """Let the loop of the device live in simulated time."""
    clock = SimpleNamespace(sleep=turns.sleep, time=turns.unix, strftime=time.strftime, localtime=time.localtime)
    with ExitStack() as stack:
        for target, name, value in (
            (living, "time", clock),
            (living, "Capture", room),
            (living, "LiveView", lambda *ignored: None),
            (living.typer, "echo", lambda *ignored, **also: None),
            (live, "Worker", turning_worker(turns)),
            (os, "fsync", lambda handle: None),  # a killed process loses nothing that was written
        ):
            stack.enter_context(patch.object(target, name, value))
        yield


def day(
    folder: Path, seconds: float, seed: int, *, life_s: float = 3_600.0, every_s: float = EVERY_S
) -> tuple[Seen, DeviceState]:
    """Live ``seconds`` of a device in ``folder``; return what happened and its state.

    ``life_s``: the mean length of a process. ``every_s``: the time from clip to clip.
    """
    chance, seen, turns = random.Random(seed), Seen(), Turns()
    up, down = make_link(chance, seconds)
    cloud = make_cloud(TinyStudents(Ed25519PrivateKey.from_private_bytes(bytes(range(32)))))
    device = DeviceState(folder)
    jumps = [(seconds * 0.4, DAY_S), (seconds * 0.5, 0.0), (seconds * 0.6, -DAY_S), (seconds * 0.7, 0.0)]

    def presence(now_s: float) -> bool:
        return now_s % 7_200 < 4_500

    while turns.now_s < seconds:
        seen.lives += 1
        turns.live_again(min(seconds, turns.now_s + chance.expovariate(1 / life_s)))
        while jumps and turns.now_s >= jumps[0][0]:
            turns.unix_jump_s = jumps.pop(0)[1]
        store = ClipStore(device.root / "clips", Limits(clips=24), clock=turns.unix)
        config = RunConfig("kiosk", seed=1, rounds=ROUNDS, guard=False, epsilon_budget=EPSILON)
        config = replace(config, choices=replace(config.choices, noise=1.0))
        runtime = Runtime(
            config,
            device,
            FaultyCalls(cloud, turns, up, down, seen),
            StoredSelection(store),
            clock=turns.clock,
            unix_clock=turns.unix,
            sleep=turns.sleep,
            jitter=chance.random,
            trial=load_test,
        )
        life = Watched(SentMessages(device.root / "sent.sqlite"), turns, seen)
        if chance.random() < 0.4:
            life.personalise.set()
        room = Room(runtime, turns, presence, every_s, seen)
        _live(runtime, device, store, life, room, turns)
        seen.faults["in hand when killed"] += len(seen.in_hand)
        seen.in_hand = []
    return seen, device


def _live(runtime: Runtime, device: DeviceState, store: ClipStore, life: Watched, room: Room, turns: Turns) -> None:
    tell = living._tell

    def timed(*words: Any, **more: Any) -> None:
        life.captured_s = turns.now_s
        tell(*words, **more)

    try:
        with simulated(turns, room), patch.object(living, "_tell", timed):
            living.keep_living(runtime, device, store, RunOptions(clips_before=8), BUDGET_S, life)
    except Killed:
        pass
    finally:
        runtime.close()
        life.sent.close()


def judge(seen: Seen, device: DeviceState) -> dict[str, Any]:
    """Return what was found; ``faults`` counts what must not be."""
    in_hand = seen.faults.pop("in hand when killed", 0)
    times = Counter(seen.answered)
    ledger = device.ledger()
    spent = sum(entry.epsilon or 0.0 for entry in ledger)
    faults = seen.faults + Counter(
        {
            "answered twice": sum(count > 1 for count in times.values()),
            "lost": len(set(seen.captured) - set(times)) - in_hand,
            "answered without a clip": len(set(times) - set(seen.captured)),
            "too late": int(seen.slowest_s > BUDGET_S + 0.05),
            "applied twice": sum(count > 1 for count in seen.applied.values()),
            "overspent": int(spent > EPSILON + 1e-9),
            "sent and not in the ledger": max(0, len(set(seen.uploads.values())) - len(ledger)),
        }
    )
    return {
        "lives": seen.lives,
        "clips": len(seen.captured),
        "answers": len(seen.answered),
        "in hand when the process was killed": in_hand,
        "through the cloud": seen.by_cloud,
        "asked": seen.asked,
        "too late to be given": seen.late,
        "slowest answer, simulated s": round(seen.slowest_s, 3),
        "uploads": len(seen.uploads),
        "epsilon spent": spent,
        "student at the end": device.agent().active_id,
        "faults": {name: count for name, count in faults.items() if count},
    }


def main(
    hours: float = 24.0,
    seeds: str = "0",
    every_s: Annotated[float, typer.Option(help="Simulated seconds from clip to clip.")] = EVERY_S,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Live simulated days, one per seed."""
    report = Report(
        "day", {"hours": hours, "seeds": seeds, "every_s": every_s, "budget_s": BUDGET_S, "epsilon": EPSILON}
    )
    for seed in map(int, seeds.split(",")):
        with tempfile.TemporaryDirectory(prefix="isthmus-day-") as folder:
            report.rows.append({"seed": seed, **judge(*day(Path(folder), hours * 3600, seed, every_s=every_s))})
    report.finish({name: lambda row, name=name: str(row[name]) for name in report.rows[0]}, out)
    if any(row["faults"] for row in report.rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
