"""The progress of a run: callbacks while it goes on, and the record that its report is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field

from isthmus.data.clip import Damage
from isthmus.edge.student.download import Tally
from isthmus.proto.messages import JobStatus


@dataclass
class Observer:
    """Callbacks for progress; each default does nothing.

    ``on_accepted`` is called once the cloud has the round-0 prototypes: time to work while it trains.
    ``on_wait`` is called with the seconds of a pause and its reason.
    """

    on_stage: Callable[[str], None] = lambda stage: None
    on_job: Callable[[JobStatus], None] = lambda status: None
    on_bytes: Callable[[int, int], None] = lambda here, total: None
    on_clip: Callable[[int, int], None] = lambda done, total: None
    on_damage: Callable[[Damage], None] = lambda damage: None
    on_wait: Callable[[float, str], None] = lambda seconds, reason: None
    on_accepted: Callable[[], None] = lambda: None


@dataclass
class Record:
    """Data of a run for its report. ``stage_s``: wall seconds by stage of the device."""

    stage_s: dict[str, float] = field(default_factory=dict)
    job: JobStatus | None = None
    interim_ids: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    downloads: dict[str, Tally] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + seconds
