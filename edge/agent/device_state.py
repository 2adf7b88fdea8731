"""The files of a device's state folder, besides students and outbox.

    <root>/running            held by the one process that runs this device; it contains the process's id
    <root>/credentials.json   the enrolment with its secret token; readable by the owner only
    <root>/agent.json         the agent's state after its last step
    <root>/ledger.json        every upload of prototypes, and the privacy budget it spent
    <root>/budget.json        the number of uploads and the epsilon that the person allows
    <root>/verdict.json       the last comparison of a new student with the active one
    <root>/habits.json        how often this user is in each state, by student; never sent
    <root>/windows/<student id>.npz   features of the clips that this user's offset is estimated from; never sent
    <root>/corrections.json   what the person said of clips, and how often they may be asked; never sent
    <root>/sharing.json       with consent, the newest state that may be sent with a request for a reply; counts

Each JSON file is replaced as a whole by one rename, so a kill leaves the old or the new one. Each holds a checksum of
itself.

agent.json holds the number of the folder's format, ``FORMAT``; a file without a number is of format 1. A folder of a
higher format is refused. A change of what a file means raises the number, and lower formats must still open.
"""

import fcntl
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from isthmus.data.files import make_folder, remove, sync, write_atomically
from isthmus.data.transforms import InputSpec
from isthmus.edge.behaviour.state import Phase, Purpose, State
from isthmus.edge.own_clips.budget import Budget
from isthmus.edge.own_clips.corrections import MOST_KEPT, Correction
from isthmus.edge.own_clips.habits import Habits
from isthmus.edge.own_clips.own_clips import StoredVerdict
from isthmus.edge.own_clips.person import Said
from isthmus.edge.own_clips.sharing import Sharing
from isthmus.edge.own_clips.window import Window
from isthmus.edge.student.disk import disk_errors
from isthmus.edge.student.kept import read_kept, unreadable, write_kept
from isthmus.proto.checks import identifier
from isthmus.proto.convert import enrolment_from_pb
from isthmus.proto.errors import Corrupt, InvalidInput, IsthmusError, Locked
from isthmus.proto.limits import MAX_ROUNDS
from isthmus.proto.messages import Enrolment
from isthmus.proto.v1 import isthmus_pb2 as pb

FORMAT: Final = 2
"""Format 2 has a checksum in each JSON file: a flipped bit may give another number that is as good as the first."""

_IDENTITY: Final = ("agent.json", "credentials.json")

_MOST_WINDOW_BYTES: Final = 64 << 20

_UNREADABLE = (AttributeError, IsthmusError, KeyError, TypeError, ValueError)
"""What a file that parses as JSON, but was damaged, may raise."""


@dataclass(frozen=True)
class LedgerEntry:
    """One upload, by its idempotency key. ``epsilon`` is None if no noise was added; ``sent_s`` is Unix time."""

    idempotency_key: str
    round: int
    mode: str
    rows: int
    smallest: int
    sizes: tuple[int, ...]
    message_bytes: int
    epsilon: float | None
    sent_s: float


class DeviceState:
    """The state folder; it is created with mode 0700.

    Raises InvalidInput when it opens a folder of a newer version of Isthmus, Corrupt for a file that cannot be read,
    and StorageFull on a full disk.

    >>> DeviceState(folder / "device").enrolment() is None  # a new folder: the device has not enrolled
    True
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with disk_errors():
            make_folder(root, 0o700)
        self._refuse_newer()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process. Raises Locked, with the other process's id, if another one holds it."""
        with disk_errors(), (self.root / "running").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read(32).strip()
                named = f"process {holder}" if holder.isdigit() else "another process"
                raise Locked(
                    f"{named} runs the device in {self.root}; stop it first, or use another --state"
                ) from error
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def exists(self) -> bool:
        """Return whether the folder is a device's, and no other folder."""
        return any((self.root / name).exists() for name in _IDENTITY)

    def erase(self) -> None:
        """Delete all that the folder holds. The identity goes last, so that a kill leaves a folder to erase again."""
        with disk_errors():
            for path in sorted(self.root.iterdir(), key=lambda path: path.name in _IDENTITY):
                if path.name in _IDENTITY:
                    sync(self.root)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            sync(self.root)

    def enrolment(self) -> Enrolment | None:
        """Return the device's identity; None before it has enrolled."""
        raw = self._read("credentials.json")
        if raw is None:
            return None
        try:
            raw["signing_public_key"] = bytes.fromhex(raw["signing_public_key"])
            enrolment = enrolment_from_pb(pb.EnrolResponse(**raw))
            InputSpec.from_json(enrolment.input_spec_json)
            return enrolment
        except _UNREADABLE as error:
            raise self._corrupt("credentials.json") from error

    def enrolment_readable(self) -> bool:
        """Return whether the device has an identity that can be read."""
        try:
            return self.enrolment() is not None
        except Corrupt:
            return False

    def save_enrolment(self, enrolment: Enrolment) -> None:
        raw = asdict(enrolment)
        raw["signing_public_key"] = enrolment.signing_public_key.hex()
        self._write("credentials.json", raw)

    def agent(self) -> State:
        """Return the stored state of the agent; a fresh one if there is none."""
        raw = self._read("agent.json")
        if raw is None:
            return State()
        try:
            known = {field.name: field.default for field in fields(State)}
            kept = {name: value for name, value in raw.items() if name in known}
            kept |= {"phase": Phase(raw["phase"]), "purpose": Purpose(raw["purpose"]), "retry_at_s": None}
            for name, value in kept.items():
                if name != "retry_at_s" and type(value) is not type(known[name]):
                    raise TypeError(name)
                if name.endswith("_id") or name == "moved_to":
                    identifier(name, value, optional=True)
                if isinstance(value, int) and not -1 <= value <= 1 << 31:
                    raise ValueError(name)
            return State(**kept)
        except _UNREADABLE as error:
            raise self._corrupt("agent.json") from error

    def save_agent(self, state: State) -> None:
        values = {**asdict(state), "phase": state.phase.value, "purpose": state.purpose.value}
        self._write("agent.json", {"format": FORMAT, **values})

    def ledger(self) -> list[LedgerEntry]:
        """Return every upload so far, oldest first."""
        raw = self._read("ledger.json") or {"uploads": []}
        try:
            entries = [LedgerEntry(**{**entry, "sizes": tuple(entry["sizes"])}) for entry in raw["uploads"]]
            for entry in entries:
                if entry.epsilon is not None and not (math.isfinite(entry.epsilon) and entry.epsilon >= 0):
                    raise ValueError("epsilon")
                if min(entry.message_bytes, entry.smallest, entry.round, entry.rows) < 0:
                    raise ValueError("count")
            return entries
        except _UNREADABLE as error:
            raise self._corrupt("ledger.json") from error

    def add_to_ledger(self, entry: LedgerEntry) -> None:
        """Write before the upload: a failed call may have arrived. The same key is the same upload and counts once."""
        if any(known.idempotency_key == entry.idempotency_key for known in self.ledger()):
            return
        self._write("ledger.json", {"uploads": [asdict(known) for known in (*self.ledger(), entry)]})

    def budget(self) -> Budget | None:
        """Return what the person allows; None before the first enrolment."""
        raw = self._read("budget.json")
        if raw is None:
            return None
        try:
            budget = Budget(**raw)
            epsilon = budget.epsilon
            sound = type(budget.rounds) is int and 1 <= budget.rounds <= MAX_ROUNDS and type(budget.chosen) is bool
            if not sound or (epsilon is not None and not epsilon >= 0):
                raise ValueError("budget")
            return budget
        except _UNREADABLE as error:
            raise self._corrupt("budget.json") from error

    def save_budget(self, budget: Budget) -> None:
        self._write("budget.json", asdict(budget))

    def verdict(self) -> StoredVerdict | None:
        """Return the last comparison of two students; None before the first."""
        raw = self._read("verdict.json")
        if raw is None:
            return None
        try:
            return StoredVerdict(**raw)
        except TypeError as error:
            raise self._corrupt("verdict.json") from error

    def save_verdict(self, verdict: StoredVerdict) -> None:
        self._write("verdict.json", asdict(verdict))

    def habits(self) -> dict[str, Habits]:
        """Return the user's habits by student id."""
        raw = self._read("habits.json") or {"students": []}
        try:
            known = [
                Habits(**{**one, "shares": tuple(one["shares"]), "trained": tuple(one["trained"])})
                for one in raw["students"]
            ]
            for one in known:
                if len(one.shares) != len(one.trained) or not all(0 <= x <= 1 for x in (*one.shares, *one.trained)):
                    raise ValueError("shares")
            return {identifier("student id", one.student_id): one for one in known}
        except _UNREADABLE as error:
            raise self._corrupt("habits.json") from error

    def save_habits(self, habits: Iterable[Habits]) -> None:
        self._write("habits.json", {"students": [asdict(one) for one in habits]})

    def window(self, student_id: str) -> Window | None:
        """Return the clips that a student has seen; None if there are none, or the file is damaged: they come again."""
        path = self._window_path(student_id)
        try:
            if path.stat().st_size > _MOST_WINDOW_BYTES:
                return None
            return Window.from_bytes(path.read_bytes())
        except (OSError, ValueError):
            return None

    def save_window(self, student_id: str, window: Window) -> None:
        with disk_errors():
            path = self._window_path(student_id)
            make_folder(path.parent, 0o700)
            write_atomically(path, window.to_bytes(), mode=0o600)

    def keep_windows(self, student_ids: Collection[str]) -> None:
        """Remove the windows of all other students."""
        with disk_errors():
            for path in (self.root / "windows").glob("*.npz"):
                if path.stem not in student_ids:
                    remove(path)

    def forget_clips(self, names: Collection[str] | None) -> None:
        """Remove these clips, or all, from every window and from what the person said."""
        with disk_errors():
            for path in (self.root / "windows").glob("*.npz"):
                window = None if names is None else self.window(path.stem)
                left = None if window is None else window.without(names or ())
                if left is None:
                    remove(path)
                else:
                    self.save_window(path.stem, left)
        said = self.said()
        kept = tuple(one for one in said.corrections if names is not None and one.clip not in names)
        if kept != said.corrections:
            self.save_said(replace(said, corrections=kept))

    def said(self) -> Said:
        """Return what the person said of clips; an empty answer before the first."""
        raw = self._read("corrections.json")
        if raw is None:
            return Said()
        try:
            said = Said(
                tuple(Correction(**one) for one in raw["corrections"]),
                raw["questions_a_day"],
                tuple(float(at_s) for at_s in raw["asked_s"]),
            )
            texts = [text for one in said.corrections for text in (one.clip, one.label, one.student_id)]
            times = [*(one.said_s for one in said.corrections), *said.asked_s]
            if not all(isinstance(text, str) for text in texts) or not all(math.isfinite(at_s) for at_s in times):
                raise ValueError("corrections")
            if type(said.questions_a_day) is not int or len(said.corrections) > MOST_KEPT:
                raise ValueError("corrections")
            return said
        except _UNREADABLE as error:
            raise self._corrupt("corrections.json") from error

    def save_said(self, said: Said) -> None:
        self._write("corrections.json", asdict(said))

    def sharing(self) -> Sharing:
        """Return what may be said of how the user feels; nothing before the first consent."""
        raw = self._read("sharing.json")
        if raw is None:
            return Sharing()
        try:
            return Sharing(**raw)
        except _UNREADABLE as error:
            raise self._corrupt("sharing.json") from error

    def save_sharing(self, sharing: Sharing) -> None:
        self._write("sharing.json", asdict(sharing))

    def _window_path(self, student_id: str) -> Path:
        return self.root / "windows" / f"{identifier('student id', student_id)}.npz"

    def _refuse_newer(self) -> None:
        try:
            found = (self._read("agent.json") or {}).get("format", FORMAT)
        except Corrupt:
            return  # ``agent`` reports the damage.
        if isinstance(found, int) and found > FORMAT:
            raise InvalidInput(
                f"{self.root} was written by a newer version of Isthmus: its format is {found}, and this version reads "
                f"formats up to {FORMAT}. Install the newer version on this device, or give another --state folder"
            )

    def _read(self, name: str) -> dict[str, Any] | None:
        return read_kept(self.root / name)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with disk_errors():
            write_kept(self.root / name, content)

    def _corrupt(self, name: str) -> Corrupt:
        return unreadable(self.root / name)
