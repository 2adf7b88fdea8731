"""The selection clips of one device: what each student makes of them, and what the device concludes from that.

The clips are decoded, encoded and forgotten. What stays is the features of the student in use, and in the notes the
user's habits or the window of clips, and the last comparison of two students.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.transforms import InputSpec
from isthmus.edge.capture.sources import Clock
from isthmus.edge.own_clips.corrections import said
from isthmus.edge.own_clips.guard import Outputs, by_corrections, judge
from isthmus.edge.own_clips.habits import Habits, learn
from isthmus.edge.own_clips.person import Person, PersonNotes
from isthmus.edge.own_clips.personal import Reading
from isthmus.edge.own_clips.selection_pass import PrototypeChoices, encode_selection, prototypes_from
from isthmus.edge.own_clips.window import Seen
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import Corrupt
from isthmus.proto.messages import Features, FloatArray, Prototypes

_CHECKED_CLIPS = 4


@dataclass(frozen=True)
class StoredVerdict:
    """The guard's verdict on student ``new_id`` in place of ``old_id``.

    ``old`` and ``new`` are estimates of accuracy (0 to 1) by the estimator's name.
    """

    old_id: str
    new_id: str
    accept: bool
    reason: str
    estimator: str
    margin: float
    clips: int
    changed: int
    old: dict[str, float]
    new: dict[str, float]


class Notes(PersonNotes, Protocol):
    """Where the device keeps what it has learned of its user. Nothing of it is ever sent."""

    def habits(self) -> dict[str, Habits]:
        """Returns the habits by student id."""

    def save_habits(self, habits: Iterable[Habits]) -> None: ...

    def save_verdict(self, verdict: StoredVerdict) -> None: ...


class OwnClips:
    """Encodes the selection clips with the students in ``slot``. Their labels are never read.

    ``use_habits`` False adapts no answer to the user. ``on_clip`` is called with (clips done, clips in all).
    """

    def __init__(
        self,
        selection: Sequence[ClipRef],
        slot: StudentSlot,
        spec: InputSpec,
        notes: Notes,
        choices: PrototypeChoices,
        *,
        classes: int,
        seed: int,
        use_habits: bool,
        clock: Clock,
        on_clip: Callable[[int, int], None],
        on_damage: Callable[[Damage], None],
    ) -> None:
        self._selection = selection
        self._slot = slot
        self._spec = spec
        self._notes = notes
        self._choices = choices
        self._classes = classes
        self._seed = seed
        self._use_habits = use_habits
        self._clock = clock
        self._on_clip = on_clip
        self._on_damage = on_damage
        self._encoder: tuple[str, StudentEncoder] | None = None
        self._known: tuple[str, dict[str, Features]] = ("", {})
        self.person = Person(notes, slot)

    def encoder(self, student_id: str) -> StudentEncoder:
        """Returns the installed student's models; the last student asked for stays loaded."""
        if self._encoder is None or self._encoder[0] != student_id:
            self._encoder = (student_id, self._load(student_id))
        return self._encoder[1]

    def habits(self, student_id: str) -> Habits | None:
        """Returns the user's habits as this student's answers show them; None if they are unknown or not wanted."""
        return self._notes.habits().get(student_id) if self._use_habits else None

    def reading(self, student_id: str) -> Reading | None:
        """Returns how this student's answers are read for the user: by the person model if the student has one, else by
        habits; None if neither is known, or they are not wanted."""
        if not self._use_habits:
            return None
        return self.person.reading(student_id) or self.habits(student_id)

    def reading_without_labels(self, student_id: str) -> Reading | None:
        """Returns ``reading`` as it would be without any correction."""
        if not self._use_habits:
            return None
        return self.person.unsaid(student_id) or self.habits(student_id)

    def remember(self, student_id: str, seen: Seen) -> None:
        """Adds a clip that was answered just now to what is known of the user, unless that is not wanted."""
        if self._use_habits:
            self.person.add(student_id, seen)

    def prototypes(self, student_id: str, *, in_use: Collection[str]) -> Prototypes:
        """Encodes the selection clips with the student and returns what may leave the device.

        For a student in ``in_use`` the features are kept for the guard and habits are learned. Raises BadPrototypes
        if too few clips can be used, Corrupt for a student that fails.
        """
        encoder = self.encoder(student_id)
        encoded = {name: features for name, (features,) in self._encode((encoder,)).items()}
        if student_id in in_use:
            self._known = (student_id, encoded)
            self._learn(student_id, encoder, encoded, in_use)
        return prototypes_from(tuple(encoded.values()), encoder, self._choices, classes=self._classes, seed=self._seed)

    def compare(self, old_id: str, new_id: str, *, in_use: Collection[str]) -> tuple[bool, str]:
        """Compares two students on the selection clips; returns whether the new one is accepted, and why.

        Each clip is decoded once; cached features of the old student are reused. The verdict and the new student's
        habits go into the notes. Raises Corrupt for a student that fails.
        """
        old, new = self.encoder(old_id), self._load(new_id)
        known_id, known = self._known
        if known_id == old_id:
            of_new = {name: features for name, (features,) in self._encode((new,)).items()}
            pairs = {name: (known[name], features) for name, features in of_new.items() if name in known}
        else:
            pairs = {name: (before, after) for name, (before, after) in self._encode((old, new)).items()}
        if not pairs:
            return False, "no selection clip could be used to compare the new student by"
        outputs_old = self._outputs(old_id, old, [before for before, _ in pairs.values()])
        outputs_new = self._outputs(new_id, new, [after for _, after in pairs.values()])
        try:
            verdict = judge(outputs_old, outputs_new)
        except ValueError as error:
            return False, f"the new student cannot be judged: {error}"
        self._learn(new_id, new, {name: after for name, (_, after) in pairs.items()}, in_use)
        verdict = by_corrections(
            verdict,
            self._as_seen(old_id, outputs_old, [before for before, _ in pairs.values()]),
            self._as_seen(new_id, outputs_new, [after for _, after in pairs.values()]),
            said(self.person.said().corrections, pairs, self._slot.installed(new_id).manifest.classes),
        )
        self._notes.save_verdict(
            StoredVerdict(
                old_id,
                new_id,
                verdict.accept,
                verdict.reason,
                verdict.decided_by,
                verdict.rule.margin,
                verdict.clips,
                verdict.changed,
                verdict.old,
                verdict.new,
            )
        )
        return verdict.accept, verdict.reason

    def learn_user(self, student_id: str, *, in_use: Collection[str]) -> None:
        """Learns the user with a student that no comparison has run on the clips; keeps what is known.

        Raises Corrupt for a student that fails.
        """
        if self._use_habits and not self._knows_user(student_id):
            encoder = self._load(student_id)
            encoded = {name: features for name, (features,) in self._encode((encoder,)).items()}
            self._learn(student_id, encoder, encoded, in_use)

    def check_runs(self, student_id: str) -> None:
        """Run the student on the first selection clips. Raises Corrupt if it fails or gives NaN or infinity."""
        encoder = self._load(student_id)
        encoded = self._encode((encoder,), self._selection[:_CHECKED_CLIPS]).values()
        if encoded:
            encoder.local_probabilities_of([features for (features,) in encoded])

    def _load(self, student_id: str) -> StudentEncoder:
        """Load the student after comparing its files with the signed manifest. Raises Corrupt if they differ."""
        return StudentEncoder(self._slot.checked(student_id).folder)

    def _encode(
        self, encoders: Sequence[StudentEncoder], refs: Sequence[ClipRef] | None = None
    ) -> dict[str, tuple[Features, ...]]:
        return encode_selection(
            self._selection if refs is None else refs,
            encoders,
            self._spec,
            clock=self._clock,
            on_clip=self._on_clip,
            on_damage=self._on_damage,
        )

    def _outputs(self, student_id: str, encoder: StudentEncoder, features: Sequence[Features]) -> Outputs:
        measured = self._slot.installed(student_id).manifest.measured
        return Outputs(
            encoder.local_probabilities_of(features),
            encoder.teacher_probabilities(features),
            None if measured is None else measured.atc_threshold,
        )

    def _as_seen(self, student_id: str, outputs: Outputs, features: Sequence[Features]) -> FloatArray:
        """Returns a student's answers to clips as they are read for the user, before any correction."""
        reading = self.reading_without_labels(student_id)
        if reading is None:
            return outputs.local_NC
        return np.stack([reading.local(row_C, each) for row_C, each in zip(outputs.local_NC, features, strict=True)])

    def _knows_user(self, student_id: str) -> bool:
        manifest = self._slot.installed(student_id).manifest
        if manifest.centred is not None:
            return self._notes.window(student_id) is not None
        shares = () if manifest.measured is None else manifest.measured.class_shares
        return not shares or student_id in self._notes.habits()

    def _learn(
        self, student_id: str, encoder: StudentEncoder, features: Mapping[str, Features], in_use: Collection[str]
    ) -> None:
        """Writes what the clips show of the user at once: their features if the student has a person model, else
        habits. Drops those of students that are neither this one nor ``in_use``."""
        if not self._use_habits or not features:
            return
        manifest = self._slot.installed(student_id).manifest
        try:
            answers_NC = encoder.local_probabilities_of(tuple(features.values()))
            if manifest.centred is not None:
                seen = [
                    Seen(name, each, row_C) for (name, each), row_C in zip(features.items(), answers_NC, strict=True)
                ]
                self.person.begin(student_id, seen, in_use=in_use)
            if manifest.measured is not None and manifest.measured.class_shares:
                found = learn(student_id, answers_NC, manifest.measured.class_shares)
                kept = {name: one for name, one in self._notes.habits().items() if name in in_use}
                self._notes.save_habits({**kept, student_id: found}.values())
        except ValueError as error:
            raise Corrupt(f"student {student_id}: {error}") from error
