"""Statistics per task: counts and times since the server started."""

from dataclasses import dataclass, field, replace
from typing import Final

from isthmus.cloud.elastic.scheduling.query import Outcome
from isthmus.cloud.histogram import Histogram

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class TaskStatistics:
    """``answered`` and ``refused`` count images. ``batches`` counts the batches that held an image of the task.

    ``overloaded`` counts images that the queue did not take because it was full. They have no outcome. ``queued`` and
    ``taken`` are the times of answered images: in the queue, and in all. ``earned`` is the expected utility of the
    images answered in time: each one's utility times the task's accuracy at the gamma at which it ran. ``offered`` is
    what all images would have earned, each at its best gamma and in time.
    """

    answered: int = 0
    refused: int = 0
    batches: int = 0
    total_s: float = 0.0
    refused_s: float = 0.0
    queue_s: float = 0.0
    run_s: float = 0.0
    last_unix_s: float = 0.0
    outcomes: dict[Outcome, int] = field(default_factory=dict)
    overloaded: int = 0
    earned: float = 0.0
    offered: float = 0.0
    queued: Histogram = field(default_factory=Histogram)
    taken: Histogram = field(default_factory=Histogram)

    def copy(self) -> "TaskStatistics":
        """Return a copy that later counts do not change."""
        return replace(self, outcomes=dict(self.outcomes), queued=self.queued.copy(), taken=self.taken.copy())

    def note(self, outcome: Outcome, *, queue_s: float, run_s: float, unix_s: float) -> None:
        """Counts one image with its outcome, its time in the queue, and the time of its batch."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if outcome in (Outcome.EVICTED, Outcome.FAILED):
            self.refused += 1
            self.refused_s += queue_s + run_s
        else:
            self.answered += 1
            self.total_s += queue_s + run_s
            self.queue_s += queue_s
            self.run_s += run_s
            self.last_unix_s = unix_s
            self.queued.note(queue_s)
            self.taken.note(queue_s + run_s)


@dataclass(frozen=True)
class Snapshot:
    """Everything that was counted, at one moment.

    ``pending``: images that wait or run, by task; ``gammas``: images that ran, by gamma; ``experts``: the same by
    experts per token, empty if the model has none; ``waiting``: images in the queue; ``running``: batches under way, of
    at most ``executors``; ``wanted``: executors that are not suspended; ``restarts``: executors that were lost and
    started again; ``pace``: see ``scheduling/pace.py``; ``paces``: the same of each executor that is there, by number.
    """

    tasks: dict[str, TaskStatistics]
    pending: dict[str, int]
    gammas: dict[int, int]
    experts: dict[int, int]
    batch_images: Histogram
    batch_s: Histogram
    waiting: int
    running: int
    executors: int
    wanted: int
    restarts: int
    pace: float
    paces: dict[int, float]
