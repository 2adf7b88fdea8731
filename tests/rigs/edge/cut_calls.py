"""Calls of a device through a link that cuts their connection at a random byte, against a real server.

Each call is tried again as the device does it, until it succeeds. What the cloud then has must be what was sent, once.
"""

import asyncio
import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from isthmus.cloud.personalise import job, job_rows
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.cloud.store.database import Database
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.link.model import Direction, Phase
from isthmus.link.script import Script
from isthmus.proto.codec import pack_frame
from isthmus.proto.convert import prototypes_from_pb
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.errors import Busy, OutOfOrder, Unauthenticated, Unavailable, WrongState
from isthmus.proto.messages import (
    FeatureFrame,
    Features,
    FloatArray,
    NumberType,
    Prototypes,
    StudentManifest,
    UploadMode,
    compressed_width,
)
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.edge.faulty_link import faulty_link
from tests.rigs.project.patience import HANGS_S

_Result = TypeVar("_Result")

KINDS = ("enrol", "start", "upload", "watch", "describe", "fetch", "infer", "forget")
NEVER = 1 << 40
MOST_TRIES = 6_000
_CLIPS = 4
PAUSE_S = 0.02
"""gRPC waits before it connects again; meanwhile each call fails at once."""
_MOST_IDLE = 200
"""A cut may fall behind the last byte of a call: of "forget" every third is cut."""

_MOST_BYTES = {"fetch": 3_000_000}
"""A cut falls within so many bytes of a connection; a call with its handshake takes about as many."""


@dataclass
class Tally:
    """``cuts`` and ``tries`` by kind of call; ``faults``: what the cloud had more or less often than once."""

    cuts: Counter[str] = field(default_factory=Counter)
    tries: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


@contextmanager
def serving(release: Path, state: Path) -> Iterator[tuple[int, Database]]:
    """Run a server without a worker in a thread; yield its port and its database."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    without_end = 1 << 20
    settings = CloudSettings(
        release=release,
        state=state,
        workers=0,
        max_devices=without_end,
        max_enrolments_per_hour=without_end,
        max_queued_jobs=without_end,
    )
    server = Server(settings)
    port = asyncio.run_coroutine_threadsafe(server.start(), loop).result(HANGS_S)
    database = Database(f"sqlite:///{state.absolute() / 'isthmus.db'}")
    try:
        yield port, database
    finally:
        database.close()
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(HANGS_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(HANGS_S)


def cut_calls(release: Path, state: Path, *, cuts: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Tally:
    """Cut ``cuts`` connections of each kind of call, and compare what the cloud has with what was sent."""
    tally = Tally()
    with serving(release, state) as (port, database):
        for kind in kinds:
            rng = random.Random(f"{seed} {kind}")
            idle = 0
            while tally.cuts[kind] < cuts:
                before = tally.cuts[kind]
                _one(kind, port, database, rng, tally)
                idle = idle + 1 if tally.cuts[kind] == before else 0
                if idle == _MOST_IDLE:
                    raise AssertionError(f"none of {idle} calls of {kind} was cut")
    return tally


def _one(kind: str, port: int, database: Database, rng: random.Random, tally: Tally) -> None:
    """Do one call over a link whose first connections are cut at a random byte of a random way."""
    at = [rng.randrange(_MOST_BYTES.get(kind, 1_500)) for _ in range(rng.randint(1, 2))]
    # The list ends: later connections are not cut.
    way = Direction((Phase(cut_at_byte=tuple(at)),))
    script = Script(up=way) if kind != "fetch" and rng.random() < 0.5 else Script(down=way)
    direct = GrpcLink(open_channel(f"127.0.0.1:{port}"))
    try:
        with faulty_link(port, script) as link:
            through = GrpcLink(open_channel(link.address))
            try:
                _CALLS[kind](direct, through, database, rng, tally)
            finally:
                through.close()
            tally.cuts[kind] += link.link.counts.cut
        tally.done[kind] += 1
    finally:
        direct.close()


def _until(kind: str, tally: Tally, call: Callable[[], _Result]) -> _Result:
    def counted() -> _Result:
        tally.tries[kind] += 1
        return call()

    return _patiently(counted)


def _patiently(call: Callable[[], _Result]) -> _Result:
    """Try a call again as a device does: while the cloud cannot be reached, or has no time."""
    for _ in range(MOST_TRIES):
        try:
            return call()
        except (Busy, Unavailable):
            time.sleep(PAUSE_S)
    raise AssertionError(f"a call did not succeed in {MOST_TRIES} tries")


def _enrol(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    enrolment = _until("enrol", tally, lambda: through.enrol("kiosk", ""))
    direct.authenticate(enrolment.token)
    _patiently(
        lambda: direct.describe_student("")
    )  # The token that arrived is known; an identity whose answer was cut has no holder.


def _start(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    device_id, prototypes = _known(direct, through, rng)
    key = f"{rng.getrandbits(64):x}"
    status = _until("start", tally, lambda: through.start_personalisation(key, prototypes, rounds=2, seed=1))
    mine = job_rows.listing(database, [device_id])
    if [each.job_id for each in mine] != [status.job_id]:
        tally.faults[f"start: {len(mine)} jobs"] += 1
    _compare("start", database, status.job_id, 0, prototypes, tally)


def _upload(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    _, first = _known(direct, through, rng)
    job_id = _patiently(lambda: direct.start_personalisation("key", first, rounds=2, seed=1)).job_id
    for event in (job.Taken(), job.Selected((4, 4)), job.Distilled(), job.Exported("interim")):
        job_rows.apply(database, job_id, event, 1.0)
    prototypes = _prototypes(rng)

    def upload() -> None:
        try:
            through.upload_prototypes(job_id, 1, prototypes)
        except (WrongState, OutOfOrder):
            return  # The cloud is past this round: an earlier try arrived, and only its answer was lost.

    _until("upload", tally, upload)
    _compare("upload", database, job_id, 1, prototypes, tally)
    found = job_rows.get(database, job_id)
    if found is None or found.round != 1:
        tally.faults["upload: the job is in another round"] += 1


def _watch(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    _, prototypes = _known(direct, through, rng)
    job_id = _patiently(lambda: direct.start_personalisation("key", prototypes, rounds=2, seed=1)).job_id
    seen = _until("watch", tally, lambda: next(through.watch_job(job_id)))
    if seen.job_id != job_id:
        tally.faults["watch: another job"] += 1


def _describe(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    _known(direct, through, rng)
    known = _patiently(lambda: direct.describe_student(""))
    if _until("describe", tally, lambda: through.describe_student("")) != known:
        tally.faults["describe: another manifest"] += 1


def _fetch(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    _known(direct, through, rng)
    manifest = manifest_from_bytes(_patiently(lambda: direct.describe_student("")).manifest_bytes)
    file, received = manifest.files[0], bytearray()

    def fetch() -> None:
        for chunk in through.fetch_file(manifest.student_id, file.name, len(received)):
            received.extend(chunk.data)

    _until("fetch", tally, fetch)
    if hashlib.sha256(received).digest() != file.sha256:
        tally.faults["fetch: other bytes"] += 1


def _infer(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    """Ask several clips over one stream, which is opened again when it is cut; each answer must be its own clip's."""
    _known(direct, through, rng)
    manifest = manifest_from_bytes(_patiently(lambda: direct.describe_student("")).manifest_bytes)
    frames = [_frame(manifest, rng) for _ in range(_CLIPS)]
    expected = _patiently(lambda: _answers(direct, manifest.student_id, frames, []))
    answers: list[FloatArray] = []
    _until("infer", tally, lambda: _answers(through, manifest.student_id, frames, answers))
    if not all(map(np.array_equal, answers, expected)):
        tally.faults["infer: another clip's answer"] += 1


def _answers(link: GrpcLink, student_id: str, frames: list[bytes], answers: list[FloatArray]) -> list[FloatArray]:
    """Add the answers to the frames that have none yet, and return all. Raises what the link raises."""
    session = link.open_infer(student_id, timeout_s=60.0)
    try:
        for sequence, frame in enumerate(frames[len(answers) :], 1):
            reply = session.ask(sequence, frame, timeout_s=10.0)
            assert reply.probabilities_C is not None, reply.error_message
            answers.append(reply.probabilities_C)
    finally:
        session.close()
    return answers


def _frame(manifest: StudentManifest, rng: random.Random) -> bytes:
    values = np.random.default_rng(rng.getrandbits(32)).random((2, manifest.feature_width)).astype(np.float32)
    ratio = min(manifest.ratios)
    width = compressed_width(manifest.feature_width, ratio)
    return pack_frame(FeatureFrame(Features(values[0, :width], values[1, :width]), ratio, NumberType.FP32))


def _forget(direct: GrpcLink, through: GrpcLink, database: Database, rng: random.Random, tally: Tally) -> None:
    device_id, prototypes = _known(direct, through, rng)
    _patiently(lambda: direct.start_personalisation("key", prototypes, rounds=2, seed=1))

    def forget() -> None:
        try:
            through.forget()
        except Unauthenticated:
            return  # An earlier try arrived: the token is unknown now.

    _until("forget", tally, forget)
    if job_rows.listing(database, [device_id]):
        tally.faults["forget: jobs are left"] += 1


_Call = Callable[[GrpcLink, GrpcLink, Database, random.Random, Tally], None]
_CALLS: dict[str, _Call] = {
    "enrol": _enrol,
    "start": _start,
    "upload": _upload,
    "watch": _watch,
    "describe": _describe,
    "fetch": _fetch,
    "infer": _infer,
    "forget": _forget,
}


def _known(direct: GrpcLink, through: GrpcLink, rng: random.Random) -> tuple[str, Prototypes]:
    enrolment = _patiently(lambda: direct.enrol("kiosk", ""))
    direct.authenticate(enrolment.token)
    through.authenticate(enrolment.token)
    return enrolment.device_id, _prototypes(rng)


def _prototypes(rng: random.Random) -> Prototypes:
    values_KC = np.random.default_rng(rng.getrandbits(32)).dirichlet(np.ones(3), 4).astype(np.float32)
    return Prototypes(values_KC, np.full(4, 3, np.int32), UploadMode.PROTOTYPES, 3)


def _compare(kind: str, database: Database, job_id: str, round: int, sent: Prototypes, tally: Tally) -> None:
    stored = prototypes_from_pb(pb.Prototypes.FromString(job_rows.payload(database, job_id, round)))
    if not np.array_equal(stored.values_KC, sent.values_KC):
        tally.faults[f"{kind}: other prototypes"] += 1
