"""Answers to clips one by one as they arrive, at the setting that the link allows: a device that keeps running.

A worker thread personalises meanwhile. As long as it works, the link is its own and clips are answered by the device
alone, with the student in use; so they are answered while a job is under way and while the cloud is gone.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from isthmus.data.clip import ClipRef
from isthmus.data.layouts.listing import read_listing
from isthmus.edge.agent.behaviour import Answered, Answering, Failed, Tick
from isthmus.edge.agent.inference import Answer, CloudAnswers, answer_locally
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.capture.sources import Taken
from isthmus.edge.link.compression import Setting, choose, make_policy
from isthmus.edge.own_clips.window import Seen
from isthmus.edge.student.encoder import StudentEncoder, encode
from isthmus.proto.errors import Busy, Corrupt, WrongState
from isthmus.proto.messages import NumberType

PROBE_EVERY_S = 10.0
"""While the link is too slow for the budget, one clip per this time probes it; else a better link stays unnoticed."""

CHECK_EVERY_S = 24 * 3600.0
"""The student's files are compared with its signed manifest this often while the device runs."""

_LOOK_AGAIN_S = 0.5


@dataclass(frozen=True)
class LiveAnswer:
    """An answer. ``setting`` None means that the device answered alone."""

    name: str
    answer: Answer
    setting: Setting | None


class Worker:
    """Runs one task at a time in a thread of its own; ``check`` raises what a task raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, task: Callable[[], object]) -> None:
        """Start the task. Raises WrongState if another one is running."""
        if self.busy:
            raise WrongState("the device's worker is busy")

        def work() -> None:
            try:
                task()
            except BaseException as error:  # Raised again by check, in the thread that waits for the task.
                self._failure = error

        # A daemon: the process may end at any point, because all that matters is on disk.
        self._thread = threading.Thread(target=work, name="isthmus-personalise", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the last task raised, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class LiveAnswers:
    """Answers with the student in use. The local answer replaces the cloud's if that does not come in time.

    ``pause`` sleeps for some seconds; it is called while there is no student yet.
    """

    def __init__(self, runtime: Runtime, worker: Worker, latency_budget_s: float, pause: "Pause") -> None:
        self._runtime = runtime
        self._worker = worker
        self._budget_s = latency_budget_s
        self._pause = pause
        self._student: _Student | None = None
        self._setting: Setting | None = None
        self._probe_at_s = runtime.clock()
        self._checked_s = runtime.clock()

    def answer(self, taken: Taken, jitter: float) -> LiveAnswer:
        """Answer one clip; waits for a student if there is none yet.

        ``jitter`` in [0, 1) spreads the retries of devices that lose the cloud at the same time.
        """
        while True:
            self._worker.check()
            self._check_daily()
            try:
                return self._answer(taken, jitter)
            except (Corrupt, WrongState):
                # The student was replaced or damaged just now. The worker repairs it; another one answers meanwhile.
                self._drop()
                self._repair()
                self._pause(_LOOK_AGAIN_S)

    def close(self) -> None:
        self._drop()

    def _answer(self, taken: Taken, jitter: float) -> LiveAnswer:
        student, name = self._current(), taken.ref.name
        features = encode(student.encoder, taken, self._runtime.spec, self._runtime.clock).features
        clips = self._runtime.clips
        reading = clips.reading(student.student_id)
        alone = answer_locally(student.encoder, features, self._runtime.clock)
        self._setting = None if self._worker.busy else self._choose(student)
        answered = None
        if self._setting is not None:
            answer = student.cloud.ask(features, self._setting).read(reading, features, cloud=True)
            if answer.probabilities_C is not None:
                self._runtime.note_link(Answered())
                answered = LiveAnswer(name, answer, self._setting)
            else:
                self._runtime.note_link(Failed(Busy(answer.error, retry_after_s=answer.retry_after_s), jitter))
        if alone.probabilities_C is not None:
            clips.remember(student.student_id, Seen(name, features, alone.probabilities_C))
        return answered or LiveAnswer(name, alone.read(reading, features, cloud=False), None)

    def _current(self) -> "_Student":
        active_id = self._runtime.state.active_id
        if not active_id:
            raise WrongState("there is no student yet")
        if self._student is None or self._student.student_id != active_id:
            self._drop()
            runtime = self._runtime
            installed = runtime.slot.checked(active_id)
            encoder = StudentEncoder(installed.folder)
            manifest = installed.manifest
            cloud = CloudAnswers(
                runtime.link,
                encoder,
                manifest,
                runtime.clock,
                on_failure=lambda error: None,
                timeout_s=self._budget_s,
                most_tries=1,
                estimate=runtime.estimate,
            )
            self._student = _Student(active_id, encoder, cloud)
        return self._student

    def _choose(self, student: "_Student") -> Setting | None:
        now_s = self._runtime.clock()
        manifest = student.cloud.manifest
        policy = make_policy(manifest.feature_width, manifest.ratios, tuple(NumberType), self._budget_s)
        link_up = self._runtime.note_link(Tick()) is Answering.CLOUD
        setting = choose(policy, student.cloud.estimate, self._setting, link_up=link_up)
        if setting is None and link_up and now_s >= self._probe_at_s:
            setting = policy.settings[-1]
        if setting is not None:
            self._probe_at_s = now_s + PROBE_EVERY_S
        return setting

    def _check_daily(self) -> None:
        if self._worker.busy or self._runtime.clock() < self._checked_s + CHECK_EVERY_S:
            return
        self._checked_s = self._runtime.clock()
        self._repair()

    def _repair(self) -> None:
        if not self._worker.busy and not self._runtime.check_student():
            self._drop()
            self._worker.start(lambda: self._runtime.run(patient=True))

    def _drop(self) -> None:
        if self._student is not None:
            self._student.cloud.close()
            self._student = None


@dataclass(frozen=True)
class _Student:
    student_id: str
    encoder: StudentEncoder
    cloud: CloudAnswers


class Pause(Protocol):
    def __call__(self, seconds: float, /) -> None: ...


def appearing_clips(data: Path, layout: str, seen: set[str], pause: Pause, every_s: float = 1.0) -> Iterator[ClipRef]:
    """Yield clips that appear in the folder and are not in ``seen``, without end. Raises ValueError if it vanishes."""
    while True:
        for ref in read_listing(data, layout).refs:  # not the incomplete ones: their other file may still arrive
            if ref.name not in seen:
                seen.add(ref.name)
                yield ref
        pause(every_s)
