"""This device's one user, as each student sees them: the window of clips, the corrections, and the reading they give.

The running device adds clips as it answers them, and commands add corrections, each from a thread of its own. All of it
stays in the state folder.
"""

import threading
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np

from isthmus.edge.own_clips.corrections import MOST_KEPT, MOST_USED, Correction, least_certain
from isthmus.edge.own_clips.personal import Personal, understand
from isthmus.edge.own_clips.window import Seen, Window
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import InvalidInput, IsthmusError, StorageFull, WrongState

DEFAULT_QUESTIONS_A_DAY: Final = 5
MOST_QUESTIONS_A_DAY: Final = 1_000

ESTIMATE_EVERY_CLIPS: Final = 10
"""The offset is estimated again, and the window is written, after so many answered clips."""

_DAY_S: Final = 24 * 3600.0


@dataclass(frozen=True)
class Said:
    """What the person said, oldest first, and how often they may be asked.

    ``asked_s``: Unix times of the questions of the last day.
    """

    corrections: tuple[Correction, ...] = ()
    questions_a_day: int = DEFAULT_QUESTIONS_A_DAY
    asked_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Question:
    """A clip whose label would teach the device most; ``guesses``: its likeliest classes with their probabilities."""

    clip: str
    guesses: tuple[tuple[str, float], ...]


class PersonNotes(Protocol):
    """Where windows and corrections are kept."""

    def window(self, student_id: str) -> Window | None:
        """Returns the window of a student; None if there is none that can be read."""

    def save_window(self, student_id: str, window: Window) -> None: ...

    def keep_windows(self, student_ids: Collection[str]) -> None:
        """Removes the windows of all other students."""

    def forget_clips(self, names: Collection[str] | None) -> None:
        """Removes these clips, or all, from every window and from what the person said."""

    def said(self) -> Said: ...

    def save_said(self, said: Said) -> None: ...


class Person:
    """The user, as the students in ``slot`` see them. ``revision`` changes whenever a reading may have changed."""

    def __init__(self, notes: PersonNotes, slot: StudentSlot) -> None:
        self.revision = 0
        self._notes = notes
        self._slot = slot
        self._lock = threading.RLock()
        self._windows: dict[str, Window] = {}
        self._unwritten = 0
        self._known: tuple[str, int, Personal | None] = ("", -1, None)

    def reading(self, student_id: str) -> Personal | None:
        """Returns how the student's answers are read; None if it has no person model, or no clip has been seen."""
        with self._lock:
            if self._known[:2] != (student_id, self.revision):
                self._known = (student_id, self.revision, self._understood(student_id, self._notes.said().corrections))
            return self._known[2]

    def unsaid(self, student_id: str) -> Personal | None:
        """Returns the reading that the clips alone give, without any correction; None as ``reading``."""
        with self._lock:
            return self._understood(student_id, ())

    def begin(self, student_id: str, seen: Iterable[Seen], *, in_use: Collection[str]) -> None:
        """Sets the window of a student that has just run on the selection clips."""
        with self._lock:
            window = Window.of(seen, pinned=self._pinned())
            self._notes.save_window(student_id, window)
            self._notes.keep_windows({student_id, *in_use})
            self._windows = {name: one for name, one in self._windows.items() if name in in_use}
            self._windows[student_id] = window
            self.revision += 1

    def add(self, student_id: str, seen: Seen) -> None:
        """Adds a clip that was answered just now; nothing happens for a student without a window.

        The estimate follows after ``ESTIMATE_EVERY_CLIPS`` clips. On a full disk the window is written later.
        """
        with self._lock:
            window = self._window(student_id)
            if window is None:
                return
            self._windows[student_id] = window.with_clip(seen, pinned=self._pinned())
            self._unwritten += 1
            if self._unwritten >= ESTIMATE_EVERY_CLIPS:
                self._unwritten = 0
                self.revision += 1
                with suppress(StorageFull):
                    self._notes.save_window(student_id, self._windows[student_id])

    def correct(self, student_id: str, clip: str, label: str, now_s: float) -> Personal:
        """Adds what the person said of a clip, and returns the new reading.

        Raises InvalidInput for a label that is no class and a clip that is not in the window, WrongState if the
        student has no person model.
        """
        with self._lock:
            window, classes = self._correctable(student_id)
            if label not in classes:
                raise InvalidInput(f"{label!r} is no class of this student; it knows {', '.join(classes)}")
            if clip not in window.names:
                raise InvalidInput(
                    f"{clip!r} is not among the {len(window)} clips that this device remembers; it forgets older ones, "
                    "and clips that it never saw cannot be corrected"
                )
            said = self._notes.said()
            made = (*said.corrections, Correction(clip, label, now_s, student_id))[-MOST_KEPT:]
            self._notes.save_window(student_id, window)  # It may hold clips that are not written yet.
            return self._say(student_id, replace(said, corrections=made))

    def undo(self, student_id: str) -> tuple[Correction, Personal]:
        """Takes back the newest correction; returns it, and the reading before it. Raises WrongState without one."""
        with self._lock:
            self._correctable(student_id)
            said = self._notes.said()
            if not said.corrections:
                raise WrongState("there is no correction to take back")
            return said.corrections[-1], self._say(student_id, replace(said, corrections=said.corrections[:-1]))

    def forget(self, names: Collection[str] | None) -> None:
        """Forgets clips that the person has deleted, and their corrections; None forgets all."""
        with self._lock:
            for student_id, window in self._windows.items():
                self._notes.save_window(student_id, window)  # It may hold clips that are not written yet.
            self._windows.clear()
            self._notes.forget_clips(names)
            self.revision += 1

    def question(self, student_id: str, now_s: float, *, a_day: int | None = None) -> Question:
        """Returns the clip to ask about: the least certain one that has both sound and picture and is not corrected.

        ``a_day`` sets how many questions a day are allowed, and is kept. Raises WrongState if no further question is
        allowed today, or no clip is left to ask about.
        """
        with self._lock:
            window, classes = self._correctable(student_id)
            said = self._notes.said()
            if a_day is not None:
                if not 0 <= a_day <= MOST_QUESTIONS_A_DAY:
                    raise InvalidInput(f"{a_day} questions a day; 0 to {MOST_QUESTIONS_A_DAY} can be set")
                said = replace(said, questions_a_day=a_day)
                self._notes.save_said(said)
            recent = tuple(at_s for at_s in said.asked_s if now_s - _DAY_S < at_s <= now_s)
            if len(recent) >= said.questions_a_day:
                wait_h = 0.0 if not recent else (min(recent) + _DAY_S - now_s) / 3600
                again = "" if said.questions_a_day == 0 else f"; the next is due in {wait_h:.1f} h"
                raise WrongState(
                    f"{said.questions_a_day} questions a day are allowed{again}. "
                    "'isthmus edge ask --a-day' sets another number"
                )
            reading = self.reading(student_id)
            assert reading is not None
            corrected = {one.clip for one in said.corrections}
            open_N = window.present_NM.all(axis=1) & np.array([name not in corrected for name in window.names])
            answers_NC = reading.answers(window.features_MND, window.present_NM, window.raw_NC)
            row = least_certain(answers_NC, open_N)
            if row is None:
                raise WrongState("no clip with sound and picture is left to ask about")
            self._notes.save_said(replace(said, asked_s=(*recent, now_s)))
            ranked = sorted(zip(classes, answers_NC[row].tolist(), strict=True), key=lambda pair: -pair[1])
            return Question(window.names[row], tuple(ranked[:3]))

    def classes(self, student_id: str) -> tuple[str, ...]:
        """Returns the student's classes. Raises WrongState if it is not here, Corrupt for a damaged manifest."""
        return self._slot.installed(student_id).manifest.classes

    def said(self) -> Said:
        """Returns what the person said so far."""
        return self._notes.said()

    def _say(self, student_id: str, said: Said) -> Personal:
        self._notes.save_said(said)
        self.revision += 1
        reading = self.reading(student_id)
        assert reading is not None
        return reading

    def _correctable(self, student_id: str) -> tuple[Window, tuple[str, ...]]:
        manifest = self._slot.installed(student_id).manifest
        window = self._window(student_id)
        if manifest.centred is None:
            raise WrongState(
                "the student in use cannot learn from corrections: its release has no person model, because it knows "
                "too few people or an earlier version made it"
            )
        if window is None:
            raise WrongState(
                "the student in use cannot learn from corrections yet: it looks at this device's clips when the device "
                "personalises, which it does by itself or by Personalise now on its page"
            )
        return window, manifest.classes

    def _understood(self, student_id: str, corrections: Sequence[Correction]) -> Personal | None:
        try:
            manifest = self._slot.installed(student_id).manifest
        except IsthmusError:
            return None
        window = None if manifest.centred is None else self._window(student_id)
        if manifest.centred is None or window is None:
            return None
        return understand(student_id, manifest.centred, window, corrections, manifest.classes)

    def _window(self, student_id: str) -> Window | None:
        if student_id not in self._windows:
            found = self._notes.window(student_id)
            if found is None:
                return None
            self._windows[student_id] = found
        return self._windows[student_id]

    def _pinned(self) -> Sequence[str]:
        return [one.clip for one in self._notes.said().corrections[-MOST_USED:]]
