"""A device's link to a cloud in memory, over a model of a link with faults, in simulated time."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from isthmus.edge.link.interface import MemoryCloud, MemoryInferSession, MemoryLink
from isthmus.link.model import Direction, LinkState, Phase, transmit
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.errors import TooLate, Unavailable
from isthmus.proto.keepalive import NOTICED_S
from isthmus.proto.messages import InferReply, JobStatus, Prototypes
from tests.conftest import TinyStudents
from tests.rigs.edge.turns import Turns

CALL_BYTES: Final = 400
CALL_S: Final = 10.0
"""The deadline of a call that is no question."""
BROKEN: Final = frozenset({"final-2", "final-4"})


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
