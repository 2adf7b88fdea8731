"""The selection clips of one device: what each student makes of them, and what the device concludes from that.

The clips are decoded, encoded and forgotten. What stays is the features of the student in use (in memory), and the
user's habits and the last comparison of two students (in the notes).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.transforms import InputSpec
from isthmus.edge.capture.sources import Clock
from isthmus.edge.own_clips.guard import Outputs, judge
from isthmus.edge.own_clips.habits import Habits, learn
from isthmus.edge.own_clips.selection_pass import PrototypeChoices, encode_selection, prototypes_from
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import Corrupt
from isthmus.proto.messages import Features, Prototypes

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


class Notes(Protocol):
    """Where the device keeps what it has learned of its user. Nothing of it is ever sent."""

    def habits(self) -> dict[str, Habits]:
        """Returns the habits by student id."""

    def save_habits(self, habits: Iterable[Habits]) -> None: ...

    def save_verdict(self, verdict: StoredVerdict) -> None: ...


class OwnClips:
    """Encodes the selection clips with the students in ``slot``. Their labels are never read.

    ``use_habits`` False learns and returns no habits. ``on_clip`` is called with (clips done, clips in all).
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

    def encoder(self, student_id: str) -> StudentEncoder:
        """Returns the installed student's models; the last student asked for stays loaded."""
        if self._encoder is None or self._encoder[0] != student_id:
            self._encoder = (student_id, self._load(student_id))
        return self._encoder[1]

    def habits(self, student_id: str) -> Habits | None:
        """Returns the user's habits as this student's answers show them; None if they are unknown or not wanted."""
        return self._notes.habits().get(student_id) if self._use_habits else None

    def prototypes(self, student_id: str, *, in_use: Collection[str]) -> Prototypes:
        """Encodes the selection clips with the student and returns what may leave the device.

        For a student in ``in_use`` the features are kept for the guard and habits are learned. Raises BadPrototypes
        if too few clips can be used, Corrupt for a student that fails.
        """
        encoder = self.encoder(student_id)
        encoded = {name: features for name, (features,) in self._encode((encoder,)).items()}
        if student_id in in_use:
            self._known = (student_id, encoded)
            self._learn(student_id, encoder, tuple(encoded.values()), in_use)
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
            pairs = [(known[name], features) for name, features in of_new.items() if name in known]
        else:
            pairs = [(before, after) for before, after in self._encode((old, new)).values()]
        if not pairs:
            return False, "no selection clip could be used to compare the new student by"
        outputs_old = self._outputs(old_id, old, [before for before, _ in pairs])
        outputs_new = self._outputs(new_id, new, [after for _, after in pairs])
        try:
            verdict = judge(outputs_old, outputs_new)
        except ValueError as error:
            return False, f"the new student cannot be judged: {error}"
        self._learn(new_id, new, [after for _, after in pairs], in_use)
        self._notes.save_verdict(
            StoredVerdict(
                old_id,
                new_id,
                verdict.accept,
                verdict.reason,
                verdict.rule.estimator.value,
                verdict.rule.margin,
                verdict.clips,
                verdict.changed,
                verdict.old,
                verdict.new,
            )
        )
        return verdict.accept, verdict.reason

    def learn_habits(self, student_id: str, *, in_use: Collection[str]) -> None:
        """Learns the user's habits with a student that no comparison has run on the clips; keeps known ones.

        Raises Corrupt for a student that fails.
        """
        if self._trained_shares(student_id) and student_id not in self._notes.habits():
            encoder = self._load(student_id)
            encoded = self._encode((encoder,)).values()
            self._learn(student_id, encoder, [features for (features,) in encoded], in_use)

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

    def _trained_shares(self, student_id: str) -> tuple[float, ...]:
        """Returns the class shares that the student's heads were trained on; empty if unknown or habits are off."""
        measured = self._slot.installed(student_id).manifest.measured
        return () if measured is None or not self._use_habits else measured.class_shares

    def _learn(
        self, student_id: str, encoder: StudentEncoder, features: Sequence[Features], in_use: Collection[str]
    ) -> None:
        """Writes the habits at once, and drops those of students that are neither this one nor ``in_use``."""
        trained = self._trained_shares(student_id)
        if not trained or not features:
            return
        try:
            found = learn(student_id, encoder.local_probabilities_of(features), trained)
        except ValueError as error:
            raise Corrupt(f"student {student_id}: {error}") from error
        kept = {name: one for name, one in self._notes.habits().items() if name in in_use}
        self._notes.save_habits({**kept, student_id: found}.values())
