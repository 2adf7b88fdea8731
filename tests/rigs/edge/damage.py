"""Damage to each file of a state folder in turn, and how the product takes it.

A fault is an exception that is not one line for a person, a refusal that does not name the file or the way out, or an
answer that no sound student gives.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from isthmus.command_line import is_expected, one_line
from isthmus.edge.agent.device_state import DeviceState, LedgerEntry
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.state import Phase, State
from isthmus.edge.link.interface import MemoryCloud, MemoryLink
from isthmus.edge.link.outbox import Entry, Outbox
from isthmus.edge.own_clips.budget import Budget
from isthmus.edge.own_clips.habits import Habits
from isthmus.edge.own_clips.own_clips import StoredVerdict
from isthmus.edge.requests.requests import ask
from isthmus.edge.student.download import Tally, fetch_student
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.edge.student.slot import StudentSlot
from tests.rigs.edge.device import load_test

WAYS_OUT = ("move it away", "restore", "remove", "again", "start over", "check that", "--accept-release", "enrol")


def files(folder: Path) -> list[str]:
    """Return the names of all files of the folder, but for links and locks without content."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size]
    return sorted(str(path.relative_to(folder)) for path in found)


def damages(content: bytes, bits: int, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Yield kinds of damage with the content that is left; None stands for a folder in the file's place."""
    yield "empty", b""
    yield "half", content[: len(content) // 2]
    for _ in range(bits):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        yield "bit", bytes(flipped)
    yield "folder", None


def put(path: Path, content: bytes | None) -> None:
    """Replace the file; it may be a hard link to the sound one."""
    mode = path.stat().st_mode
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
        path.chmod(mode)


def told(error: Exception, name: str) -> str:
    """Return how a refusal counts: as told, or as a fault with its text."""
    line = one_line(error)
    if not is_expected(error):
        return f"FAULT: {type(error).__name__}: {line}"
    named = Path(name).name in line or any(part in line for part in Path(name).parts[1:])
    if not named or not any(way in line for way in WAYS_OUT):
        return f"FAULT: says neither the file nor a way out: {line}"
    return "refused by name"


def sweep(folder: Path, copies: Path, bits: int, use: Callable[[Path, str], str]) -> dict[str, Counter[str]]:
    """Damage each file of a copy of ``folder``; return the outcomes of ``use`` (copy, file) per file."""
    outcomes: dict[str, Counter[str]] = {}
    for name in files(folder):
        chance = random.Random(name)
        seen = outcomes[name] = Counter()
        for number, (kind, content) in enumerate(damages((folder / name).read_bytes(), bits, chance)):
            copy = copies / f"{number}"
            shutil.copytree(folder, copy, symlinks=True)
            put(copy / name, content)
            outcome = use(copy, name)
            seen[f"{kind}: {outcome}" if outcome.startswith("FAULT") else outcome] += 1
            shutil.rmtree(copy)
    return outcomes


class DeviceFolder:
    """A device at the end of a personalisation: two students, habits, ledger, budget, verdict and outbox."""

    def __init__(self, root: Path, cloud: MemoryCloud, public_key: bytes) -> None:
        self.root = root
        self._cloud = cloud
        state = DeviceState(root)
        state.save_enrolment(cloud.enrolment)
        state.save_agent(State(phase=Phase.SERVE, active_id="final", base_id="base", done=True))
        state.save_budget(Budget(2))
        state.add_to_ledger(LedgerEntry("k", 0, "prototypes", 2, 4, (4, 5), 60, 1.5, 0.0))
        state.save_verdict(StoredVerdict("base", "final", True, "as good", "joint", 0.0, 8, 1, {}, {}))
        slot = StudentSlot(root / "students", public_key, load_test)
        link = MemoryLink(cloud)
        link.authenticate(cloud.enrolment.token)
        for student_id in ("base", "final"):
            fetch_student(link, slot, student_id, lambda here, total: None, Tally())
            slot.verify(student_id)
            slot.activate(student_id)
        state.save_habits([Habits(each, 8, (0.6, 0.3, 0.1), (0.4, 0.3, 0.3)) for each in ("base", "final")])
        outbox = Outbox(root / "outbox.sqlite")
        outbox.put(Entry("prototypes/1", "k2", b"prototypes", 1.0))
        outbox.close()
        with state.held():
            pass
        self._known = {self._answer(state, student_id): student_id for student_id in ("base", "final")}

    def use(self, copy: Path, name: str) -> str:
        """Ask for the status, check the student and answer a clip, as a start of the device does."""
        try:
            state = DeviceState(copy)
            with state.held():
                ask(state, "status")
                active_id = self._start(state)
                if not active_id:
                    return "no sound student: it is fetched again"
                answer = self._answer(state, active_id)
        except Exception as error:
            return told(error, name)
        if answer not in self._known:
            return "FAULT: another answer"
        return "the same answer" if self._known[answer] == "final" else "the base student answers"

    def _start(self, state: DeviceState) -> str:
        runtime = Runtime(RunConfig("kiosk"), state, MemoryLink(self._cloud), (), trial=load_test)
        try:
            runtime.check_student()
            return runtime.state.active_id
        finally:
            runtime.close()

    def _answer(self, state: DeviceState, student_id: str) -> bytes:
        folder = state.root / "students" / "versions" / student_id
        chance = np.random.default_rng(5)
        sound, pictures = chance.random((16, 16), np.float32), chance.random((2, 3, 16, 16), np.float32)
        encoder = StudentEncoder(folder, probe=False)
        local_C = encoder.local_probabilities(encoder.features(sound, pictures))
        known = state.habits().get(student_id)
        return local_C.tobytes() if known is None else known.answer(local_C).tobytes()
