"""The interface between runner and learning code. ``distilling.py`` implements it with ``isthmus.distill``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from isthmus.distill.selection import Selection
from isthmus.proto.errors import Unavailable
from isthmus.proto.messages import Prototypes

OnEpoch = Callable[[int, int], None]
"""Called with (epochs done, total epochs) after each epoch. It may raise to stop the work."""

INT8_FILES: Final = ("int8.audio_encoder.onnx", "int8.visual_encoder.onnx", "int8.json")
"""Beside the heads of a student in int8: its encoders, and what int8 costs. If it costs too much, only the last."""


class StepDied(Unavailable):
    """The process that performed a step elsewhere has died, and its machine has not: the step may have killed it."""


@dataclass(frozen=True)
class RoundWork:
    """One round of a job: the public clips selected for it, and the checkpoint shared by all rounds.

    ``round``: train to the end of this round (from 0, of ``rounds``). A settled job trains to the end of the last one.
    """

    selection: Selection
    round: int
    rounds: int
    seed: int
    checkpoint: Path


class Learning(Protocol):
    """The learning steps of a job. Each is deterministic in its arguments and may be repeated after a crash.

    Steps that run elsewhere raise Unavailable if they are lost, and StepDied.
    """

    def select(self, prototypes: Prototypes, *, round: int, seed: int) -> Selection:
        """Select public clips; returns them in order, with a weight for each."""
        ...

    def per_class(self, selection: Selection) -> tuple[int, ...]:
        """Count the selected clips of each class."""
        ...

    def distil(self, work: RoundWork, on_epoch: OnEpoch) -> None:
        """Train the round's student, resuming from the checkpoint and writing to it."""
        ...

    def train_heads(self, work: RoundWork, heads: Path, on_epoch: OnEpoch) -> None:
        """Train compressors and heads on the finished student of the checkpoint and write them to ``heads``.

        Their results on public clips are written to ``students.MEASURED_FILE`` beside it, the student's person model,
        if it has one, to ``students.PERSON_FILE``, and those of INT8_FILES that it has, before ``heads`` appears.
        """
        ...

    def export(self, work: RoundWork, heads: Path | None, out_dir: Path) -> list[Path]:
        """Write the device's files of the round's student to ``out_dir``. Without heads the student is an interim one.

        What ``train_heads`` wrote beside the heads is used, if it is there.
        A file ``<name>.patch`` among them turns the base student's file ``<name>`` into this student's.
        """
        ...
