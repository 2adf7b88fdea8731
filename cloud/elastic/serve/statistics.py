"""Statistics per task: counts and times since the server started."""

from dataclasses import dataclass, field

from isthmus.cloud.elastic.scheduling.query import Outcome


@dataclass
class TaskStatistics:
    """``answered`` and ``refused`` count images. ``batches`` counts the batches that held an image of the task."""

    answered: int = 0
    refused: int = 0
    batches: int = 0
    total_s: float = 0.0
    refused_s: float = 0.0
    queue_s: float = 0.0
    run_s: float = 0.0
    last_unix_s: float = 0.0
    outcomes: dict[Outcome, int] = field(default_factory=dict)

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
