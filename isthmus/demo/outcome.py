"""What the demo ends with, as plain data: what the table and the HTML page are made from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isthmus.demo.stages import StageRecord


@dataclass(frozen=True)
class Answering:
    """One way of answering, over a client's test clips."""

    name: str
    right: int
    clips: int
    median_ms: float | None
    """From features to answer, without the encoder; None where it was not timed."""
    bytes_up: float
    """What one clip costs on the link, upwards."""

    @property
    def accuracy(self) -> float:
        return self.right / self.clips if self.clips else float("nan")


@dataclass(frozen=True)
class ClientOutcome:
    """What became of one device. Axes: K prototypes, C classes."""

    name: str
    own_classes: tuple[str, ...]
    selection_clips: int
    test_clips: int
    answering: tuple[Answering, ...]
    """The base student alone comes first: it is "before"."""
    encode_median_ms: float
    raw_bytes_per_clip: float
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    prototypes_KC: npt.NDArray[np.float32]
    sizes_K: npt.NDArray[np.int32]
    prototype_bytes: int
    """The message that carried the first round's prototypes."""
    min_cluster: int
    epsilon: float | None
    selected_per_class: tuple[int, ...]
    rounds: int
    """How often prototypes were sent: once a round, of this form each time. Those of the first are kept here."""
    cloud_seconds: dict[str, float]
    rss_bytes: int
    verdict: str
    """What the device's guard said of the new student, and whether the labels bear it out."""
    student_bytes: int
    """What came down of students, as patches where there are any; and what the same files are whole."""
    whole_student_bytes: int

    @property
    def before(self) -> Answering:
        return self.answering[0]

    @property
    def after(self) -> Answering:
        """The personal student, answered by the cloud at the least compression; what the paper reports."""
        return self.answering[1]


@dataclass(frozen=True)
class KeptClip:
    """One of a device's clips, for a person to look at; it never left. Axes: T samples, K pictures in time order."""

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
    """Per client, the teacher's share of right answers: jointly, and by each branch alone."""
    losses: dict[str, tuple[float, ...]]
    """Per training stage, the mean loss of each epoch."""
    stages: tuple[StageRecord, ...]
    total_seconds: float
    edge_python: Path
    edge_has_torch: bool
    machine: str


def readable_bytes(count: float) -> str:
    """1536 -> "1.5 kB": powers of 1000, as link rates are told."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def readable_seconds(seconds: float) -> str:
    """75 -> "1 min 15 s"; short times keep a decimal."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
