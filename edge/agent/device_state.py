"""What a device keeps in its state folder, besides students and outbox: who it is, where it stands, what it gave away.

    <root>/credentials.json   the enrolment with its secret token; readable by the owner only
    <root>/agent.json         the agent's state after its last step
    <root>/ledger.json        every upload of prototypes: what left the device, and the privacy budget it spent
    <root>/verdict.json       the last comparison of a new student with the one in use
    <root>/habits.json        how often this user is in each state, as each student in use reads it; never sent

Each file is replaced as a whole by one rename, so a kill leaves the old or the new one.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from isthmus.data.files import write_atomically
from isthmus.edge.agent.behaviour import Phase, Purpose, State
from isthmus.edge.own_clips.habits import Habits
from isthmus.edge.own_clips.own_clips import StoredVerdict
from isthmus.edge.student.slot import disk_errors
from isthmus.proto.convert import enrolment_from_pb
from isthmus.proto.errors import Corrupt, IsthmusError
from isthmus.proto.messages import Enrolment
from isthmus.proto.v1 import isthmus_pb2 as pb


@dataclass(frozen=True)
class LedgerEntry:
    """One upload, under its idempotency key. ``epsilon`` is None where no noise was added; ``sent_s`` is Unix time."""

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
    """The folder is made with mode 0700. Raises Corrupt for a file that does not read, StorageFull on a full disk.

    >>> DeviceState(folder / "device").enrolment() is None  # a new folder: the device has not enrolled
    True
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with disk_errors():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def enrolment(self) -> Enrolment | None:
        """Who this device is; None before it has enrolled."""
        raw = self._read("credentials.json")
        if raw is None:
            return None
        try:
            raw["signing_public_key"] = bytes.fromhex(raw["signing_public_key"])
            return enrolment_from_pb(pb.EnrolResponse(**raw))
        except (IsthmusError, KeyError, TypeError, ValueError) as error:
            raise self._corrupt("credentials.json") from error

    def save_enrolment(self, enrolment: Enrolment) -> None:
        raw = asdict(enrolment)
        raw["signing_public_key"] = enrolment.signing_public_key.hex()
        self._write("credentials.json", raw)

    def agent(self) -> State:
        """The stored state; a fresh one where there is none."""
        raw = self._read("agent.json")
        if raw is None:
            return State()
        try:
            known = {field.name for field in fields(State)}
            raw = {name: value for name, value in raw.items() if name in known}
            return State(**{**raw, "phase": Phase(raw["phase"]), "purpose": Purpose(raw["purpose"])})
        except (KeyError, TypeError, ValueError) as error:
            raise self._corrupt("agent.json") from error

    def save_agent(self, state: State) -> None:
        self._write("agent.json", {**asdict(state), "phase": state.phase.value, "purpose": state.purpose.value})

    def ledger(self) -> list[LedgerEntry]:
        """Every upload so far, oldest first."""
        raw = self._read("ledger.json") or {"uploads": []}
        try:
            return [LedgerEntry(**{**entry, "sizes": tuple(entry["sizes"])}) for entry in raw["uploads"]]
        except (KeyError, TypeError) as error:
            raise self._corrupt("ledger.json") from error

    def add_to_ledger(self, entry: LedgerEntry) -> None:
        """Written before the upload, since a failed call may have arrived. The same key is the same upload, once."""
        if any(known.idempotency_key == entry.idempotency_key for known in self.ledger()):
            return
        self._write("ledger.json", {"uploads": [asdict(known) for known in (*self.ledger(), entry)]})

    def verdict(self) -> StoredVerdict | None:
        """The last comparison of two students; None before the first."""
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
        """By student id."""
        raw = self._read("habits.json") or {"students": []}
        try:
            known = [
                Habits(**{**one, "shares": tuple(one["shares"]), "trained": tuple(one["trained"])})
                for one in raw["students"]
            ]
        except (KeyError, TypeError) as error:
            raise self._corrupt("habits.json") from error
        return {one.student_id: one for one in known}

    def save_habits(self, habits: Iterable[Habits]) -> None:
        self._write("habits.json", {"students": [asdict(one) for one in habits]})

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.root / name
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._corrupt(name) from error
        if not isinstance(raw, dict):
            raise self._corrupt(name)
        return raw

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with disk_errors():
            write_atomically(self.root / name, json.dumps(content), mode=0o600)

    def _corrupt(self, name: str) -> Corrupt:
        return Corrupt(f"{self.root / name} does not read; move it away and run again")
