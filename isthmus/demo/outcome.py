"""The result of the demo as plain data. The table and the HTML page are made from it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.demo.stages import StageRecord


@dataclass(frozen=True)
class Answering:
    """One way of answering, measured on a client's test clips."""

    name: str
    right: int
    clips: int
    median_ms: float | None
    """Time from features to answer, without the encoder. None if it was not measured."""
    bytes_up: float
    """Bytes sent to the cloud per clip."""

    @property
    def accuracy(self) -> float:
        return self.right / self.clips if self.clips else float("nan")


WAYS: Final = ("before", "without_labels", "with_corrections")
"""The three states of a client in result.json: the base student; the personal student with the user's voice and face
learned from unlabelled clips; the same after corrections. All three answer on the device."""


@dataclass(frozen=True)
class AnsweredClips:
    """What was answered to a client's test clips, in one order. ``predicted``: for each of ``WAYS``, a class index or
    None per clip.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    predicted: dict[str, tuple[int | None, ...]]

    def right(self, way: str) -> tuple[int, ...]:
        """Return 1 per clip that was answered rightly, else 0."""
        return tuple(int(one == label) for one, label in zip(self.predicted[way], self.labels, strict=True))

    def by_class(self, way: str) -> dict[int, tuple[int, int]]:
        """Return how many clips of each class were answered rightly, and how many there are."""
        right = self.right(way)
        return {
            label: (sum(hit for hit, own in zip(right, self.labels, strict=True) if own == label), count)
            for label, count in sorted(Counter(self.labels).items())
        }


@dataclass(frozen=True)
class Correction:
    """A question of the device, about a selection clip, and the answer: what the clip really is."""

    clip: str
    guess: str
    label: str


@dataclass(frozen=True)
class Spoken:
    """A reply of the language model to a client. ``sent``: what its device sent of how the user feels, or None."""

    said: str
    sent: dict[str, str | float] | None
    reply: str


@dataclass(frozen=True)
class ClientOutcome:
    """The result of one device. Axes: K prototypes, C classes."""

    name: str
    own_classes: tuple[str, ...]
    selection_clips: int
    test_clips: int
    answering: tuple[Answering, ...]
    """The base student on the device comes first: it is the state "before"."""
    tested: AnsweredClips
    corrections: tuple[Correction, ...]
    """Empty if the student cannot learn from corrections, because its release has no person model."""
    learned: tuple[str, ...]
    """What the device says it has learned of its user, in sentences."""
    encode_median_ms: float
    raw_bytes_per_clip: float
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    prototypes_KC: npt.NDArray[np.float32]
    sizes_K: npt.NDArray[np.int32]
    prototype_bytes: int
    """Size of the message with the first round's prototypes."""
    min_cluster: int
    epsilon: float | None
    selected_per_class: tuple[int, ...]
    rounds: int
    """How often prototypes were sent: once per round. Those of the first round are kept here."""
    cloud_seconds: dict[str, float]
    rss_bytes: int
    verdict: str
    """The decision of the device's guard on the new student, and whether the labels confirm it."""
    student_bytes: int
    """Bytes of students downloaded, as patches if there are any; and bytes of the same files in full."""
    whole_student_bytes: int
    spoken: Spoken | None = None
    """None if the demo was run without a language model."""

    @property
    def ways(self) -> tuple[str, ...]:
        """Those of ``WAYS`` that differ: without corrections the last one is the one before it."""
        return WAYS if self.corrections else WAYS[:-1]

    @property
    def before(self) -> Answering:
        return self.answering[0]

    @property
    def after(self) -> Answering:
        """The personal student on the device, once it knows its user's voice and face and the corrections."""
        return self.answering[-1]

    @property
    def by_cloud(self) -> Answering:
        """The personal student through the cloud at the lowest compression."""
        return next(way for way in self.answering if way.bytes_up > 0)


@dataclass(frozen=True)
class KeptClip:
    """A clip shown in the report. It never left its device. Axes: T samples, K pictures in time order."""

    name: str
    waveform_T: npt.NDArray[np.float32]
    sample_rate_hz: int
    pictures_KHWC: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DemoOutcome:
    data_name: str
    synthetic: bool
    preset: str
    seed: int
    classes: tuple[str, ...]
    public_clips: int
    skipped_clips: int
    clients: tuple[ClientOutcome, ...]
    kept: tuple[KeptClip, ...]
    """One clip of each client."""
    teacher_accuracy: dict[str, dict[str, float]]
    """Accuracy of the teacher per client: both branches together, and each alone."""
    losses: dict[str, tuple[float, ...]]
    """Mean loss per epoch, by training stage."""
    stages: tuple[StageRecord, ...]
    total_seconds: float
    edge_python: Path
    edge_has_torch: bool
    machine: str


def readable_bytes(count: float) -> str:
    """Return "1.5 kB" for 1536: powers of 1000, as for link rates."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def readable_seconds(seconds: float) -> str:
    """Return "1 min 15 s" for 75. Short times keep one decimal."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
