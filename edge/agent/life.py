"""What a running device shows of itself to those that watch it, and what they may ask of it while it lives."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from isthmus.data.clip import Damage
from isthmus.edge.agent.asking import LinkMemory
from isthmus.edge.agent.live import LiveAnswer
from isthmus.edge.agent.progress import Observer
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.agent.service_manager import ServiceManager
from isthmus.edge.link.sent import Frames, SentMessages
from isthmus.edge.watched.happenings import Happenings
from isthmus.edge.watched.view import LiveView
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import JobStatus


@dataclass
class Life:
    """``link``: the questions to the cloud, once clips are answered. ``view``: of camera and microphone while they are
    open. ``personalise``: set if the person asks for a personalisation now. ``service``: the manager that started this
    process; it hears of each turn of the loop, so it notices a driver, a disk or a library that hangs. ``learns`` is
    False if people share this device and nobody is named: clips are answered, and nothing of them is stored or learned.
    """

    sent: SentMessages
    happenings: Happenings = field(default_factory=Happenings)
    link: LinkMemory | None = None
    view: LiveView | None = None
    working: Callable[[], bool] = lambda: False
    personalise: threading.Event = field(default_factory=threading.Event)
    service: ServiceManager = field(default_factory=lambda: ServiceManager({}, time.monotonic))
    learns: bool = True

    def answered(
        self,
        result: LiveAnswer,
        classes: tuple[str, ...],
        *,
        ended_s: float,
        took_ms: float,
        sound: bool,
        picture: bool,
        asked: bool,
    ) -> None:
        """Note the answer to a clip. ``ended_s``: Unix time of the clip's end. ``took_ms``: from the captured clip to
        its answer. ``asked``: the cloud was asked, too."""
        answer, setting = result.answer, result.setting
        probabilities_C = answer.probabilities_C
        self.happenings.note(
            "answered",
            clip=result.name,
            ended_s=ended_s,
            label=None if answer.predicted is None else classes[answer.predicted],
            probabilities=None if probabilities_C is None else [float(each) for each in probabilities_C],
            classes=list(classes),
            by="cloud" if setting is not None else "device",
            asked=asked,
            ratio=None if setting is None else setting.ratio,
            number_type=None if setting is None else setting.number_type.value,
            up_bytes=answer.up_bytes,
            took_ms=took_ms,
            round_trip_ms=answer.round_trip_ms,
            chance=None if self.link is None else self.link.probability,
            sound=sound,
            picture=picture,
        )


def followed(observer: Observer, happenings: Happenings) -> Observer:
    """Return an observer that reports to ``observer``, and notes the progress in ``happenings``."""
    stage = "start"

    def on_stage(name: str) -> None:
        nonlocal stage
        stage = name
        observer.on_stage(name)
        happenings.progress(stage=name)

    def on_job(status: JobStatus) -> None:
        observer.on_job(status)
        happenings.progress(stage=stage, job=_job_facts(status))

    def on_bytes(here: int, total: int) -> None:
        observer.on_bytes(here, total)
        happenings.progress(stage=stage, done=here, total=total, unit="bytes")

    def on_clip(done: int, total: int) -> None:
        observer.on_clip(done, total)
        happenings.progress(stage=stage, done=done, total=total, unit="clips")

    def on_damage(damage: Damage) -> None:
        observer.on_damage(damage)
        happenings.note("trouble", text=f"{damage.name} is skipped: {damage.reason}")

    def on_wait(seconds: float, reason: str) -> None:
        observer.on_wait(seconds, reason)
        happenings.progress(stage=stage, waits_s=seconds, reason=reason)

    return Observer(
        on_stage=on_stage,
        on_job=on_job,
        on_bytes=on_bytes,
        on_clip=on_clip,
        on_damage=on_damage,
        on_wait=on_wait,
        on_accepted=lambda: observer.on_accepted(),
    )


def frames_of(runtime: Runtime) -> Frames:
    """Return a function that says how to read the frames of the student in use."""
    known: tuple[str, tuple[int, tuple[float, ...]] | None] = ("", None)

    def frames() -> tuple[int, tuple[float, ...]] | None:
        nonlocal known
        active_id = runtime.state.active_id
        if active_id != known[0]:
            try:
                manifest = runtime.slot.installed(active_id).manifest
            except IsthmusError:
                return None
            known = (active_id, (manifest.feature_width, manifest.ratios))
        return known[1]

    return frames


def _job_facts(status: JobStatus) -> dict[str, Any]:
    return {
        "stage": status.stage.value,
        "round": status.round,
        "rounds": status.rounds,
        "progress": status.progress,
        "left_s": status.eta_s,
        "settled": status.settled,
        "error": status.error,
    }
