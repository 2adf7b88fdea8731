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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
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
from isthmus.edge.agent.live import LiveAnswer, Worker
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.capture.process import NOBODY, Captured
from isthmus.edge.capture.sources import Taken
from isthmus.edge.commands import living
from isthmus.edge.commands.options import RunOptions
from isthmus.edge.link.interface import MemoryCloud, MemoryInferSession, MemoryLink
from isthmus.edge.link.sent import SentMessages
from isthmus.edge.own_clips.store import ClipStore, Limits, StoredSelection
from isthmus.link.model import Direction, LinkState, Phase, transmit
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.errors import TooLate, Unavailable
from isthmus.proto.keepalive import NOTICED_S
from isthmus.proto.messages import InferReply, JobStatus, Prototypes
from tests.bench.harness import Report
from tests.conftest import TinyStudents
from tests.rigs.edge.device import load_test

DAY_S: Final = 86_400.0
BUDGET_S: Final = 0.3
"""Within which a clip is to be answered."""
EPSILON: Final = 12.0
ROUNDS: Final = 2
EVERY_S: Final = 10.0
"""From clip to clip, unless a measurement asks for another time."""
CALL_BYTES: Final = 400
CALL_S: Final = 10.0
"""The deadline of a call that is no question."""
BROKEN: Final = frozenset({"final-2", "final-4"})


class Killed(BaseException):
    """The process is killed. No handler of errors may catch it."""


class Turns:
    """Simulated time. Of all threads one runs, until it sleeps; then the one that wakes first."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.unix_jump_s = 0.0
        self.killed_at_s = float("inf")
        self._changed = threading.Condition()
        self._turn: threading.Thread = threading.current_thread()
        self._wakes: dict[threading.Thread, tuple[float, int]] = {self._turn: (0.0, 0)}
        self._count = 0
        self._dead = False

    def clock(self) -> float:
        self.now_s += 1e-5  # reading it takes time, so nothing can wait for it in a loop without end
        return self.now_s

    def unix(self) -> float:
        return 1.7e9 + self.now_s + self.unix_jump_s

    def sleep(self, seconds: float) -> None:
        """Let the other threads run for ``seconds``. Raises Killed at the end of the process."""
        me = threading.current_thread()
        with self._changed:
            self._count += 1
            self._wakes[me] = (self.now_s + max(0.0, seconds), self._count)
            self._pass_on()
            while self._turn is not me and not self._dead:
                self._changed.wait()
            if self._dead or self.now_s >= self.killed_at_s:
                self._dead = True
                self._changed.notify_all()
                raise Killed

    def add(self, thread: threading.Thread) -> None:
        with self._changed:
            self._count += 1
            self._wakes[thread] = (self.now_s, self._count)

    def begin(self) -> None:
        """Wait for the first turn of this thread."""
        with self._changed:
            while self._turn is not threading.current_thread() and not self._dead:
                self._changed.wait()
            if self._dead:
                raise Killed

    def leave(self) -> None:
        with self._changed:
            self._wakes.pop(threading.current_thread(), None)
            if not self._dead:
                self._pass_on()

    def live_again(self, killed_at_s: float) -> None:
        """Start another process, which is killed at that time."""
        self._dead, self.killed_at_s = False, killed_at_s
        self._turn = threading.current_thread()
        self._wakes = {self._turn: (self.now_s, 0)}

    def _pass_on(self) -> None:
        self._turn = min(self._wakes, key=lambda each: self._wakes[each])
        self.now_s = max(self.now_s, self._wakes[self._turn][0])
        self._changed.notify_all()


def turning_worker(turns: Turns) -> type[Worker]:
    """Return the class of a worker whose thread takes turns."""

    class TurningWorker(Worker):
        _busy = False

        @property
        def busy(self) -> bool:
            return self._busy

        def start(self, task: Callable[[], object]) -> None:
            assert not self._busy
            self._busy = True

            def work() -> None:
                try:
                    turns.begin()
                    task()
                except Killed:
                    pass
                except BaseException as error:
                    self._failure = error
                finally:
                    self._busy = False
                    turns.leave()

            self._thread = threading.Thread(target=work, daemon=True)
            turns.add(self._thread)
            self._thread.start()

        def wait(self, most_s: float) -> None:
            if self._thread is not None:
                self._thread.join(60)

    return TurningWorker


@dataclass
class Seen:
    """What happened on a day, for the checks."""

    captured: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    by_cloud: int = 0
    in_hand: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    uploads: dict[tuple[str, int], bytes] = field(default_factory=dict)
    applied: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    asked: int = 0
    late: int = 0


class FaultyCalls(MemoryLink):
    """Calls that travel over a model of a link, in simulated time."""

    def __init__(self, cloud: MemoryCloud, turns: Turns, up: Direction, down: Direction, seen: Seen) -> None:
        super().__init__(cloud)
        self.turns, self.up, self.down, self.seen = turns, up, down, seen
        self._states = {"up": LinkState(), "down": LinkState()}
        self.connected_s = turns.now_s

    def arrives_s(self, up_bytes: int, down_bytes: int) -> float:
        """Return when the answer to a message that is sent now arrives; infinity if it never does."""
        at_s = self.turns.now_s
        for name, direction, size in (("up", self.up, up_bytes), ("down", self.down, down_bytes)):
            if at_s == float("inf"):
                return at_s
            self._states[name], at_s = transmit(direction, self._states[name], at_s, size, key=name)
        return at_s

    def lost_at_s(self) -> float | None:
        """Return when the present connection was cut or became half-open, None if it is sound."""
        for starts_s, phase in self.up.starts():
            if starts_s > self.turns.now_s:
                return None
            if starts_s > self.connected_s and (phase.cut or phase.half_open or phase.refuse):
                return starts_s
        return None

    def renew(self) -> None:
        super().renew()
        self.connected_s = self.turns.now_s

    def _check_reachable(self) -> None:
        lost_s, now_s = self.lost_at_s(), self.turns.now_s
        if lost_s is not None:
            phase = self.up.at(lost_s)[1]
            if phase.half_open and now_s < lost_s + NOTICED_S:
                self.turns.sleep(min(CALL_S, lost_s + NOTICED_S - now_s))
                raise Unavailable("no answer")
            self.connected_s = now_s  # gRPC connects again by itself
        if self.up.at(self.turns.now_s)[1].refuse:
            raise Unavailable("connection refused")
        at_s = self.arrives_s(CALL_BYTES, CALL_BYTES)
        if at_s > self.turns.now_s + CALL_S:
            self.turns.sleep(CALL_S)
            raise Unavailable("deadline exceeded")
        self.turns.sleep(at_s - self.turns.now_s)

    def start_personalisation(
        self, idempotency_key: str, prototypes: Prototypes, *, rounds: int, seed: int
    ) -> JobStatus:
        status = super().start_personalisation(idempotency_key, prototypes, rounds=rounds, seed=seed)
        self._uploaded(status.job_id, 0, prototypes)
        self._check_reachable()  # the answer can be lost
        return status

    def upload_prototypes(self, job_id: str, round: int, prototypes: Prototypes) -> JobStatus:
        status = super().upload_prototypes(job_id, round, prototypes)
        self.seen.applied[job_id, round] += 1
        self._uploaded(job_id, round, prototypes)
        self._check_reachable()
        return status

    def watch_job(self, job_id: str) -> Iterator[JobStatus]:
        for status in super().watch_job(job_id):
            self.turns.sleep(30.0)  # the cloud works
            if status.student_id == "final":
                status = replace(status, student_id=f"final-{job_id.rpartition('-')[2]}")
            yield status

    def open_infer(self, student_id: str, *, timeout_s: float) -> "FaultySession":
        return FaultySession(self, student_id)  # as over gRPC, opening waits for nothing

    def _uploaded(self, job_id: str, round: int, prototypes: Prototypes) -> None:
        payload = prototypes_to_pb(prototypes).SerializeToString()
        if self.seen.uploads.setdefault((job_id, round), payload) != payload:
            self.seen.faults["a round was sent twice, differently"] += 1


class FaultySession(MemoryInferSession):
    """Questions whose answers arrive when the link lets them."""

    def __init__(self, link: FaultyCalls, student_id: str) -> None:
        super().__init__(link, student_id)
        self._calls = link
        self._due: dict[int, tuple[float, InferReply]] = {}
        self._opened_s = link.turns.now_s

    def send(self, sequence: int, frame: bytes) -> None:
        self._check_sound()
        reply = self._calls.cloud.answer(self._student_id, sequence, frame)
        lost_s = self._calls.lost_at_s()
        at_s = float("inf") if lost_s is not None else self._calls.arrives_s(len(frame) + 60, 120)
        self._due[sequence] = at_s, reply
        self._calls.seen.asked += 1

    def receive(self, sequence: int, *, timeout_s: float) -> InferReply:
        if sequence not in self._due:
            self._calls.seen.faults["an answer was taken twice"] += 1
        at_s, reply = self._due[sequence]
        turns = self._calls.turns
        if self._calls.up.at(turns.now_s)[1].refuse:
            raise Unavailable("connection refused")
        if at_s > turns.now_s + timeout_s:
            turns.sleep(timeout_s)
            self._check_sound()
            raise TooLate("no answer in time")
        turns.sleep(at_s - turns.now_s)
        del self._due[sequence]
        if reply.sequence != sequence:
            self._calls.seen.faults["an answer to another clip"] += 1
        return reply

    def late(self) -> list[tuple[int, float]]:
        self._check_sound()
        now_s = self._calls.turns.now_s
        came = [(number, now_s - at_s) for number, (at_s, _) in self._due.items() if at_s <= now_s]
        for number, _ in came:
            del self._due[number]
        self._calls.seen.late += len(came)
        return came

    def _check_sound(self) -> None:
        lost_s, now_s = self._calls.lost_at_s(), self._calls.turns.now_s
        if lost_s is None or lost_s < self._opened_s:
            return
        if not self._calls.up.at(lost_s)[1].half_open or now_s >= lost_s + NOTICED_S:
            raise Unavailable("the stream broke")


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


def make_link(chance: random.Random, seconds: float) -> tuple[Direction, Direction]:
    """Return both directions of a link that is good for some minutes, and then is not, over and over."""
    phases: list[Phase] = []
    total_s = 0.0
    while total_s < seconds:
        good_s, bad_s = chance.expovariate(1 / 600), min(7_200.0, chance.expovariate(1 / 90))
        bad = chance.choice(
            [
                Phase(bad_s, stall=True),
                Phase(bad_s, rate_bytes_s=2_000, delay_s=0.1, jitter_s=0.3, loss=0.05),
                Phase(bad_s, cut=True, refuse=True),
                Phase(bad_s, half_open=True, delay_s=0.03),
                Phase(bad_s, delay_s=0.3, jitter_s=1.0),
            ]
        )
        phases += [Phase(good_s + 1.0, delay_s=0.03, jitter_s=0.03), bad]
        total_s += good_s + bad_s + 1.0
    return Direction((*phases, Phase())), Direction((Phase(delay_s=0.02, jitter_s=0.02),))


def make_cloud(students: TinyStudents) -> MemoryCloud:
    """Return a cloud that has a student for each job; those of BROKEN are not what their manifests promise."""
    cloud = students.cloud()
    for number in range(1, 30):
        student_id = f"final-{number}"
        files = students.files("final", number)
        cloud.students[student_id] = students.signed(student_id, "final", files)
        if student_id in BROKEN:
            files = {**files, "local_head.onnx": files["local_head.onnx"][:-20] + bytes(20)}
        cloud.files.update({(student_id, name): content for name, content in files.items()})
    return cloud


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
