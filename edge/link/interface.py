"""The device's calls to the cloud, as a protocol, with an implementation in memory. over_grpc.py has the one over gRPC.

Every method raises errors of ``isthmus.proto.errors`` and no other. A Link is used by one thread at a time.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import Message

from isthmus.proto.errors import InvalidInput, NotYours, Unauthenticated, Unavailable, WrongState
from isthmus.proto.limits import CHUNK_BYTES
from isthmus.proto.messages import Chunk, Enrolment, InferReply, JobStatus, Prototypes, SignedManifest, Stage


@dataclass
class Traffic:
    """Message bytes by kind of call, in each direction, without the overhead of HTTP/2 and TLS.

    ``on_sent`` is called with each message that goes up, before it goes, in the thread that sends it.
    """

    up_bytes: Counter[str] = field(default_factory=Counter)
    down_bytes: Counter[str] = field(default_factory=Counter)
    on_sent: Callable[[Message], None] = lambda message: None

    def sends(self, kind: str, message: Message) -> None:
        """Count a message that goes up."""
        self.up_bytes[kind] += message.ByteSize()
        self.on_sent(message)


class InferSession(Protocol):
    """One stream of requests to the heads of one student."""

    def ask(self, sequence: int, frame: bytes, *, timeout_s: float) -> InferReply:
        """Send one frame and wait for its answer. ``sequence`` must increase strictly.

        A refused frame gives a reply with an error, and the session goes on. Raises Unavailable if the link broke and
        TooLate if no answer came within ``timeout_s``; both end the session.
        """

    def send(self, sequence: int, frame: bytes) -> None:
        """Send one frame without waiting. ``sequence`` must increase strictly. Raises Unavailable if the link broke."""

    def receive(self, sequence: int, *, timeout_s: float) -> InferReply:
        """Wait for the answer to a frame that was sent.

        Raises Unavailable if the link broke, which ends the session, and TooLate if no answer came within
        ``timeout_s``. The session then goes on, and the answer may still come: see ``late``.
        """

    def late(self) -> list[tuple[int, float]]:
        """Return (sequence, seconds since it came) of each answer that came after ``receive`` had given it up.

        Call it before the next ``send``. Raises Unavailable if the link broke.
        """

    def close(self) -> None: ...


class Link(Protocol):
    traffic: Traffic

    def authenticate(self, token: str) -> None:
        """Send this token with all later calls."""

    def enrol(self, device_name: str, enrolment_key: str) -> Enrolment: ...

    def start_personalisation(
        self, idempotency_key: str, prototypes: Prototypes, *, rounds: int, seed: int
    ) -> JobStatus:
        """Start a job, or return the job that this key has started. ``rounds`` 0 leaves the number to the cloud."""

    def upload_prototypes(self, job_id: str, round: int, prototypes: Prototypes) -> JobStatus: ...

    def watch_job(self, job_id: str) -> Iterator[JobStatus]:
        """Yield the job's present state, then every change. The stream may end before the job: watch again."""

    def describe_student(self, student_id: str) -> SignedManifest:
        """Return the named student's manifest; "" means the newest. The caller verifies its signature."""

    def describe_offered(self) -> SignedManifest:
        """Return the manifest of the base student that the cloud offers to this device. A cloud of version 0.1 returns
        that of the newest student. The caller verifies its signature."""

    def fetch_file(self, student_id: str, file_name: str, offset_bytes: int) -> Iterator[Chunk]:
        """Yield the file's chunks from ``offset_bytes`` on. The CRC-32 of each has been checked."""

    def forget(self) -> None:
        """Have the cloud erase this device. Afterwards its token is unknown."""

    def open_infer(self, student_id: str, *, timeout_s: float) -> InferSession:
        """Open a session. ``timeout_s`` bounds the whole session and is sent to the cloud as its deadline."""

    def renew(self) -> None:
        """Give up the present connection, which answers nothing; later calls use another one."""

    def close(self) -> None: ...


@dataclass
class MemoryCloud:
    """A cloud in this process, for tests and dry runs. It holds students, and a script drives the jobs.

    ``script`` lists the states of a job after its start. A job stays in a state AWAITING_PROTOTYPES until the
    prototypes of its round arrive. ``offered_id``: the base student that is offered ("": the newest student, as a
    cloud of version 0.1 understands the question). ``answer`` maps (student id, sequence, frame) to a reply.
    """

    enrolment: Enrolment
    students: dict[str, SignedManifest]
    files: dict[tuple[str, str], bytes]
    newest_id: str
    script: tuple[JobStatus, ...]
    answer: Callable[[str, int, bytes], InferReply]
    enrolment_key: str = ""
    offered_id: str = ""
    reachable: bool = True
    chunk_bytes: int = CHUNK_BYTES
    uploads: dict[tuple[str, int], Prototypes] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    erased: bool = False


class MemoryLink:
    """A Link into a MemoryCloud, by direct calls."""

    def __init__(self, cloud: MemoryCloud) -> None:
        self.cloud = cloud
        self.traffic = Traffic()
        self.renewals = 0
        self._token = ""

    def authenticate(self, token: str) -> None:
        self._token = token

    def enrol(self, device_name: str, enrolment_key: str) -> Enrolment:
        self._check_reachable()
        if not device_name:
            raise InvalidInput("device name: empty")
        if enrolment_key != self.cloud.enrolment_key:
            raise Unauthenticated("the enrolment key is wrong")
        self.cloud.erased = False
        return self.cloud.enrolment

    def start_personalisation(
        self, idempotency_key: str, prototypes: Prototypes, *, rounds: int, seed: int
    ) -> JobStatus:
        self._check_known()
        job_id = self.cloud.jobs.setdefault(idempotency_key, f"job-{len(self.cloud.jobs) + 1}")
        self.cloud.uploads.setdefault((job_id, 0), prototypes)
        self.traffic.up_bytes["prototypes"] += prototypes.values_KC.nbytes
        return JobStatus(job_id, Stage.QUEUED, rounds=max(rounds, 1))

    def upload_prototypes(self, job_id: str, round: int, prototypes: Prototypes) -> JobStatus:
        self._check_job(job_id)
        if (job_id, round) in self.cloud.uploads:
            raise WrongState("the prototypes of this round are here already")
        self.cloud.uploads[job_id, round] = prototypes
        self.traffic.up_bytes["prototypes"] += prototypes.values_KC.nbytes
        return JobStatus(job_id, Stage.SELECTING, round=round, rounds=round + 1)

    def watch_job(self, job_id: str) -> Iterator[JobStatus]:
        self._check_job(job_id)
        for status in self.cloud.script:
            self._check_reachable()
            waiting = status.stage is Stage.AWAITING_PROTOTYPES
            if waiting and (job_id, status.round) in self.cloud.uploads:
                continue
            yield JobStatus(**{**vars(status), "job_id": job_id})
            if waiting or status.stage.ended:
                return

    def describe_student(self, student_id: str) -> SignedManifest:
        self._check_known()
        signed = self.cloud.students.get(student_id or self.cloud.newest_id)
        if signed is None:
            raise NotYours("no such student")
        return signed

    def describe_offered(self) -> SignedManifest:
        return self.describe_student(self.cloud.offered_id)

    def fetch_file(self, student_id: str, file_name: str, offset_bytes: int) -> Iterator[Chunk]:
        self._check_known()
        content = self.cloud.files.get((student_id, file_name))
        if content is None:
            raise NotYours("no such file")
        if not 0 <= offset_bytes <= len(content):
            raise InvalidInput("the offset is outside the file")
        for start in range(offset_bytes, len(content), self.cloud.chunk_bytes):
            self._check_reachable()
            data = content[start : start + self.cloud.chunk_bytes]
            self.traffic.down_bytes["student"] += len(data)
            yield Chunk(start, data, zlib.crc32(data))

    def forget(self) -> None:
        self._check_known()
        self.cloud.uploads.clear()
        self.cloud.jobs.clear()
        self.cloud.erased = True

    def open_infer(self, student_id: str, *, timeout_s: float) -> "MemoryInferSession":
        self._check_known()
        if student_id not in self.cloud.students:
            raise NotYours("no such student")
        return MemoryInferSession(self, student_id)

    def renew(self) -> None:
        self.renewals += 1

    def close(self) -> None:
        self._token = ""

    def _check_reachable(self) -> None:
        if not self.cloud.reachable:
            raise Unavailable("the cloud cannot be reached")

    def _check_known(self) -> None:
        self._check_reachable()
        if self._token != self.cloud.enrolment.token or self.cloud.erased:
            raise Unauthenticated("no such device")

    def _check_job(self, job_id: str) -> None:
        self._check_known()
        if job_id not in self.cloud.jobs.values():
            raise NotYours("no such job")


class MemoryInferSession:
    def __init__(self, link: MemoryLink, student_id: str) -> None:
        self._link = link
        self._student_id = student_id
        self._last_sequence = -1
        self._replies: dict[int, InferReply] = {}

    def ask(self, sequence: int, frame: bytes, *, timeout_s: float) -> InferReply:
        self.send(sequence, frame)
        return self.receive(sequence, timeout_s=timeout_s)

    def send(self, sequence: int, frame: bytes) -> None:
        self._link._check_reachable()
        if sequence <= self._last_sequence:
            raise InvalidInput("the sequence does not increase")
        self._last_sequence = sequence
        self._link.traffic.up_bytes["inference"] += len(frame)
        self._replies = {sequence: self._link.cloud.answer(self._student_id, sequence, frame)}

    def receive(self, sequence: int, *, timeout_s: float) -> InferReply:
        return self._replies.pop(sequence)

    def late(self) -> list[tuple[int, float]]:
        self._link._check_reachable()
        return []

    def close(self) -> None:
        self._last_sequence = -1
