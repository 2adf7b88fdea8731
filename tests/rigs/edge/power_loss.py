"""A device's life on a disk that loses power: recorded once, cut at every change, and continued from what is left.

The life: enrol, fetch the base student, upload noisy prototypes for two rounds, swap the final student in, learn from
clips and corrections, store and delete clips, roll back, and personalise once more. After each cut:

- every file opens, and holds one of the values that the life has written there, or is ignored;
- the student in use loads, and it is there once the device has swapped one in;
- the device goes on to the end, and all uploads that ever reached the cloud are in its ledger: the privacy budget is
  not spent twice, although the noise is drawn again if prototypes are made again.
"""

import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.data.files import write_atomically
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime, roll_back
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan, plan_clips
from isthmus.edge.link.interface import MemoryCloud, MemoryLink
from isthmus.edge.own_clips.corrections import Correction
from isthmus.edge.own_clips.person import Said
from isthmus.edge.own_clips.selection_pass import PrototypeChoices
from isthmus.edge.own_clips.store import ClipStore
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import JobStatus, Prototypes
from tests.conftest import TinyStudents
from tests.rigs.data.clips import write_tiny_clips
from tests.rigs.edge.device import Clock, device
from tests.rigs.edge.power_disk import Disk, Left, Loss, write_left
from tests.rigs.edge.power_mount import mark, operations, recorded

EPSILON = 0.5
MOST_PAUSES = 30
"""A device that has not reached its end after so many pauses never does."""

CONFIG = RunConfig("kiosk", seed=1, epsilon_budget=100.0, choices=PrototypeChoices(noise=EPSILON))
LOSSES: tuple[Loss, ...] = ("all", "data", "random", "random")


class MarkingLink(MemoryLink):
    """Reports each upload before it reaches the cloud: from then on the cloud may have it."""

    def __init__(self, cloud: MemoryCloud, sent: Callable[[str], None]) -> None:
        super().__init__(cloud)
        self._sent = sent

    def start_personalisation(
        self, idempotency_key: str, prototypes: Prototypes, *, rounds: int, seed: int
    ) -> JobStatus:
        self._sent(_digest(prototypes))
        return super().start_personalisation(idempotency_key, prototypes, rounds=rounds, seed=seed)

    def upload_prototypes(self, job_id: str, round: int, prototypes: Prototypes) -> JobStatus:
        self._sent(_digest(prototypes))
        return super().upload_prototypes(job_id, round, prototypes)


@dataclass
class Findings:
    """``faults`` by kind, with the first place of each."""

    points: int = 0
    looked_at: int = 0
    resumed: int = 0
    operations: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Findings") -> None:
        """Add the findings of other cuts of the same life."""
        self.points += other.points
        self.looked_at += other.looked_at
        self.resumed += other.resumed
        self.operations = max(self.operations, other.operations)
        self.faults.update(other.faults)
        self.first = {**other.first, **self.first}

    def fault(self, kind: str, where: str) -> None:
        self.faults[kind] += 1
        self.first.setdefault(kind, where)


def live(root: Path, students: TinyStudents, plan: ClipPlan, note: Callable[[str], None]) -> None:
    """Live the whole life in ``root``. ``note`` is called with each fact that the cloud or a person knows of it."""
    cloud = _cloud(students)

    def run(again: bool = False) -> None:
        runtime, _, _ = _device(root, cloud, plan, lambda digest: note(f"sent {digest}"))
        if again:
            runtime.personalise_again()
        runtime.run()
        note(f"active {runtime.state.active_id}")
        runtime.close()

    run()
    state = DeviceState(root)
    for label in ("HAP", "SAD"):
        corrections = (*state.said().corrections, Correction(f"clip-{label}", label, 2.0, "final"))
        state.save_said(replace(Said(), corrections=corrections))
    store = ClipStore(root / "clips", clock=iter(np.arange(100.0, 200.0)).__next__)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(3)]
    names = [store.add(rng.standard_normal(8_000).astype(np.float32) / 4, pictures, students.spec) for _ in range(2)]
    store.pause()
    note("paused")
    store.delete(names[:1])
    note(f"deleted {names[0]}")
    store.resume()
    slot = _slot(root, students)
    _, agent = roll_back(slot, state.agent())
    state.save_agent(agent)
    write_atomically(root / "mine", b"a file of the person")
    run(again=True)


Life = list[list[Any]]
"""The changes of a device's disk during its life, and marks of what the world knows of it."""


def recorded_life(students: TinyStudents, plan: ClipPlan) -> Life:
    """Live a life on a file system that records it."""
    with tempfile.TemporaryDirectory() as folder:
        with recorded(Path(folder)) as mount:
            live(mount / "device", students, plan, lambda text: _mark(mount, text))
        return list(operations(Path(folder)))


def cut(
    life: Life,
    students: TinyStudents,
    plan: ClipPlan,
    *,
    every: int = 1,
    begin: int = 0,
    continue_each: int = 1,
    losses: tuple[Loss, ...] = LOSSES,
    scratch: Path | None = None,
    until_s: float = math.inf,
) -> Findings:
    """Cut a life after every ``every``-th change from ``begin`` on, once per loss.

    Each disk that differs from those before is looked at, and each ``continue_each``-th of them is continued from.
    ``scratch``: a folder in memory. Ends early at ``until_s`` of the monotonic clock.
    """
    findings, rng = Findings(), random.Random(begin)
    seen: set[bytes] = set()
    values: dict[str, set[bytes]] = {}
    disk, marks = Disk(), []
    for number, operation in enumerate(life):
        if operation[0] == "mark":
            marks.append(operation[1])
            continue
        disk.do(operation)
        findings.operations += 1
        _note_value(disk, operation, values)
        if number % every != begin:
            continue
        for loss in losses:
            if time.monotonic() > until_s:
                return findings
            left = disk.after_power_loss(loss, rng)
            findings.points += 1
            key = _key(left, marks)
            if key in seen or "/device" not in left:
                continue  # The same disk was looked at before.
            seen.add(key)
            root = Path(tempfile.mkdtemp(dir=scratch))
            write_left(left, root)
            where = f"after change {number} ({operation[0]}), loss of {loss}"
            sent = _check(root / "device", students, marks, values, findings, where)
            if sent is not None and len(seen) % continue_each == 0:
                _go_on(root / "device", students, plan, sent, findings, where)
            shutil.rmtree(root)
    return findings


def _key(left: Left, marks: list[str]) -> bytes:
    """Return a digest of a disk and of what the world knows of the device."""
    digest = sha256(repr(marks).encode())
    for path, (kind, mode, content) in left.items():
        digest.update(f"{path} {kind} {mode} {len(content)} ".encode())
        digest.update(content)
    return digest.digest()


def _check(
    root: Path,
    students: TinyStudents,
    marks: list[str],
    values: dict[str, set[bytes]],
    findings: Findings,
    where: str,
) -> set[str] | None:
    """Look at a disk; return the uploads that the cloud may have, None if the device cannot be opened."""
    findings.looked_at += 1
    for path in root.rglob("*"):
        relative = str(path.relative_to(root))
        whole = path.is_symlink() or not path.is_file() or _may_be_torn(path)
        if not whole and path.read_bytes() not in values.get(relative, set()):
            findings.fault("a torn file", f"{relative} {where}")
    sent = {each.removeprefix("sent ") for each in marks if each.startswith("sent ")}
    try:
        state = DeviceState(root)
        for read in (state.agent, state.budget, state.verdict, state.habits, state.said, state.enrolment):
            read()
        if len(state.ledger()) < len(sent):
            findings.fault("an upload without a line in the ledger", where)
        slot = _slot(root, students)
        current = slot.current() if state.enrolment() is not None else None
        if current is not None:
            slot.checked(current.manifest.student_id)
        elif any(each.startswith("active") for each in marks):
            findings.fault("no student in use", where)
        _check_clips(root, marks, findings, where)
    except IsthmusError as error:
        findings.fault(f"does not open: {type(error).__name__}", f"{error} {where}")
        return None
    return sent


def _check_clips(root: Path, marks: list[str], findings: Findings, where: str) -> None:
    if not (root / "clips").is_dir():
        return
    store = ClipStore(root / "clips", clock=lambda: 300.0)
    for clip in store.clips():
        parts = [store.folder / f"{clip.name}{end}" for end in (".wav", ".mp4")]
        if not all(part.is_file() and part.stat().st_size for part in parts):
            findings.fault("a clip without its sound or picture", where)
        if f"deleted {clip.name}" in marks:
            findings.fault("a deleted clip came back", where)


def _go_on(root: Path, students: TinyStudents, plan: ClipPlan, sent: set[str], findings: Findings, where: str) -> None:
    """Start the device again and let it finish. The cloud has lost its jobs meanwhile, which costs pauses alone."""
    after = set(sent)
    try:
        runtime, state, clock = _device(root, _cloud(students), plan, after.add)
        clock.most_sleeps = MOST_PAUSES
        agent = runtime.run(patient=True)
        if agent.phase is not Phase.SERVE or not agent.active_id:
            findings.fault("does not reach the end", f"{agent.failure} {where}")
        spent = sum(entry.epsilon or 0.0 for entry in state.ledger())
        if EPSILON * len(after) > spent + 1e-9:
            findings.fault("the privacy budget was spent twice", where)
        runtime.close()
    except (IsthmusError, TimeoutError) as error:
        findings.fault(f"does not go on: {type(error).__name__}", f"{error} {where}")
    findings.resumed += 1


def _device(
    root: Path, cloud: MemoryCloud, plan: ClipPlan, sent: Callable[[str], None]
) -> tuple[Runtime, DeviceState, Clock]:
    return device(root, cloud, plan, link=MarkingLink(cloud, sent), config=CONFIG, trial=lambda folder, manifest: None)


_clouds: dict[bytes, MemoryCloud] = {}


def _cloud(students: TinyStudents) -> MemoryCloud:
    """Return a cloud that knows no job yet. Its students are made once."""
    made = _clouds.get(students.public_key) or _clouds.setdefault(students.public_key, students.cloud())
    return replace(made, uploads={}, jobs={})


def _slot(root: Path, students: TinyStudents) -> StudentSlot:
    return StudentSlot(root / "students", students.public_key, lambda folder, manifest: None)


def _digest(prototypes: Prototypes) -> str:
    return sha256(prototypes.values_KC.tobytes()).hexdigest()


def _mark(mount: Path, text: str) -> None:
    try:
        mark(mount, text)
    except FileExistsError:
        return
    raise AssertionError("the mark was not noted")


def _may_be_torn(path: Path) -> bool:
    """Return whether a file is one that is ignored until it is complete, or SQLite's, which repairs itself."""
    return path.suffix in (".part", ".new") or path.name.startswith("outbox.sqlite") or path.name == "running"


def _note_value(disk: Disk, operation: list[object], values: dict[str, set[bytes]]) -> None:
    """Remember the content of a file that has just got its name by a rename: these are the values that are whole."""
    if operation[0] not in ("rename", "sync"):
        return
    for path, number in _files(disk):
        values.setdefault(path, set()).add(bytes(disk.inodes[number].data))


def _files(disk: Disk) -> Iterator[tuple[str, int]]:
    def below(number: int, path: str) -> Iterator[tuple[str, int]]:
        for name, child in disk.inodes[number].names.items():
            inode = disk.inodes[child]
            if inode.kind == "folder":
                yield from below(child, f"{path}{name}/")
            elif inode.kind == "file":
                yield f"{path}{name}", child

    top = disk.find("/device")
    return below(top, "") if top is not None else iter(())


def a_life(folder: Path) -> tuple[TinyStudents, ClipPlan]:
    """Return students, and a few clips below ``folder``, for a life that is cut."""
    write_tiny_clips(folder)
    students = TinyStudents(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    return students, plan_clips(folder, seed=1)
