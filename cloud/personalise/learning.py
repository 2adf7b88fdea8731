"""What the runner asks of the learning code. ``distilling.py`` answers it with ``isthmus.distill``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from isthmus.distill.selection import Selection
from isthmus.proto.messages import Prototypes

OnEpoch = Callable[[int, int], None]
"""Told (epochs done, epochs in all) after each epoch; may raise to stop the work."""


@dataclass(frozen=True)
class RoundWork:
    """One round of a job: the public clips chosen for it, and the checkpoint that all rounds share.

    ``round``: through the end of which (from 0, of ``rounds``) to train; a settled job goes through to the last one.
    """

    selection: Selection
    round: int
    rounds: int
    seed: int
    checkpoint: Path


class Learning(Protocol):
    """The learning steps of a job. Each is deterministic in its arguments and may be repeated after a kill."""

    def select(self, prototypes: Prototypes, *, round: int, seed: int) -> Selection:
        """Public clips in the order taken, and how much each counts."""
        ...

    def per_class(self, selection: Selection) -> tuple[int, ...]:
        """How many of the clips are of each class."""
        ...

    def distil(self, work: RoundWork, on_epoch: OnEpoch) -> None:
        """Trains the round's student into the checkpoint, from where that stands."""
        ...

    def train_heads(self, work: RoundWork, heads: Path, on_epoch: OnEpoch) -> None:
        """Trains compressors and heads on the finished student of the checkpoint and writes them to ``heads``.

        What they do on public clips goes to ``students.MEASURED_FILE`` beside, before ``heads`` is there.
        """
        ...

    def export(self, work: RoundWork, heads: Path | None, out_dir: Path) -> list[Path]:
        """Writes the device's files of the round's student to ``out_dir``; without heads an interim one.

        A file ``<name>.patch`` among them makes ``<name>`` of the base student's file of that name.
        """
        ...
