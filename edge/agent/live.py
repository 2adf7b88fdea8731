"""Answers to clips one by one as they arrive, at the setting that the link allows: a device that keeps running.

A worker thread personalises meanwhile. As long as it works, the link is its own and clips are answered by the device
alone, with the student in use; so they are answered while a job is under way and while the cloud is gone.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from isthmus.data.clip import ClipRef
from isthmus.data.layouts.listing import read_listing
from isthmus.edge.agent.asking import CloudQuestions, LinkMemory
from isthmus.edge.agent.inference import Answer, answer_locally
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.events import Answered, Failed, Tick
from isthmus.edge.behaviour.state import Answering, answering
from isthmus.edge.capture.sources import Taken
from isthmus.edge.link.compression import Setting, make_policy
from isthmus.edge.link.controller import assumed_rate
from isthmus.edge.own_clips.window import Seen
from isthmus.edge.student.encoder import StudentEncoder, encode
from isthmus.proto.errors import Busy, Corrupt, IsthmusError, TooLate, WrongState
from isthmus.proto.messages import NumberType

CHECK_EVERY_S = 24 * 3600.0
"""The student's files are compared with its signed manifest this often while the device runs."""

_LOOK_AGAIN_S = 0.5

_LEAVE_S = 5.0
"""The longest wait for a task when the process is to end."""


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

    def wait(self, most_s: float) -> None:
        """Wait until the task has ended, but no longer than ``most_s``."""
        if self._thread is not None:
            self._thread.join(most_s)

    def check(self) -> None:
        """Raise what the last task raised, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


@contextlib.contextmanager
def working(runtime: Runtime) -> Iterator[Worker]:
    """Yield a worker for ``runtime``. At the end its link is closed, so that calls end, and the task is waited for.

    A task that still used the outbox or a model while the runtime is closed and the interpreter ends could crash the
    process. After 5 s it is left: then it sleeps before its next try.
    """
    worker = Worker()
    try:
        yield worker
    finally:
        runtime.link.close()
        worker.wait(_LEAVE_S)


class LiveAnswers:
    """Answers with the student in use, within ``latency_budget_s`` of the clip's arrival.

    The device computes its own answer while the cloud's is on its way, and gives it if the cloud's is not there in
    time. ``pause`` sleeps for some seconds; it is called while there is no student yet.
    """

    def __init__(self, runtime: Runtime, worker: Worker, latency_budget_s: float, pause: "Pause") -> None:
        self._runtime = runtime
        self._worker = worker
        self._budget_s = latency_budget_s
        self._pause = pause
        self._student: _Student | None = None
        self.memory = LinkMemory()
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
        clock, began_s = self._runtime.clock, self._runtime.clock()
        student, name = self._current(), taken.ref.name
        encoded = encode(student.encoder, taken, self._runtime.spec, self._runtime.cpu_clock)
        features = encoded.features
        clips = self._runtime.clips
        reading = clips.reading(student.student_id)
        until_s = began_s + self._budget_s
        error: IsthmusError | None = None
        question = setting = answered = None
        if self._runtime.config.ask_cloud and not self._worker.busy:
            try:
                setting = self._choose(student, until_s - clock())
            except IsthmusError as broken:
                error = broken
        if setting is not None:
            packing_s = clock()
            frame = student.cloud.pack(features, setting)
            try:
                question = student.cloud.send(frame, (clock() - packing_s) * 1000)
            except IsthmusError as broken:
                error = broken
        alone = answer_locally(student.encoder, features, clock)
        if question is not None:
            try:
                answer = student.cloud.answer(question, until_s - clock()).read(reading, features, cloud=True)
                self._runtime.note_link(Answered())
                answered = LiveAnswer(name, answer, setting)
            except TooLate:
                pass  # It is counted when it comes. The link may be sound.
            except IsthmusError as broken:
                error = broken
        if error is not None:
            hint_s = error.retry_after_s if isinstance(error, Busy) else None
            self._runtime.note_link(Failed(Busy(str(error), retry_after_s=hint_s), jitter))
        if alone.probabilities_C is not None:
            clips.remember(student.student_id, Seen(name, features, alone.probabilities_C))
        self._runtime.note_answer(student.student_id, encoded.encode_ms)
        return answered or LiveAnswer(name, alone.read(reading, features, cloud=False), None)

    def _current(self) -> "_Student":
        active_id = self._runtime.state.active_id
        if self._student is None or self._student.student_id != active_id:
            self._drop()
            runtime = self._runtime
            active_id = runtime.student_to_use()
            installed = runtime.slot.checked(active_id)
            encoder = StudentEncoder(installed.folder)
            manifest = installed.manifest
            policy = make_policy(manifest.feature_width, manifest.ratios, tuple(NumberType), self._budget_s)
            self.memory.setting = None
            cloud = CloudQuestions(
                runtime.link, encoder, manifest, policy, self.memory, runtime.clock, jitter=random.random
            )
            self._student = _Student(active_id, encoder, cloud)
        return self._student

    def _choose(self, student: "_Student", left_s: float) -> Setting | None:
        """Return the setting at which to ask the cloud, or None.

        The agent's pauses after errors of the link are for its own calls. The controller has shorter ones, because a
        question costs little.
        """
        self._runtime.note_link(Tick())
        finished = student.cloud.manifest.kind == "final"
        if answering(replace(self._runtime.state, link_up=True), finished=finished) is not Answering.CLOUD:
            return None
        rate = self._runtime.estimate.throughput_bytes_s
        if rate:
            self.memory.history = assumed_rate(self.memory.history, rate, self._runtime.clock())
        return student.cloud.choose(left_s)

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
    cloud: CloudQuestions


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
