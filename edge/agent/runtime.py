"""Runs a device: follows its behaviour, has the actions performed, and reports the results.

Every decision is the behaviour's (edge/behaviour/step.py). Its state is on disk before its next action begins, so the
process may be killed at any point and continues when it is started again. ``run`` may be called in a thread of its own;
meanwhile other threads only read ``state``, ask for ``pause`` and call ``rollback``.
"""

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.performing import Performer
from isthmus.edge.agent.progress import Observer, Record
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.uploads import Uploads
from isthmus.edge.behaviour import events, pauses
from isthmus.edge.behaviour import state as behaviour
from isthmus.edge.behaviour.step import step
from isthmus.edge.capture.sources import Clock
from isthmus.edge.link.compression import LinkEstimate, observe_transfer
from isthmus.edge.link.interface import Link
from isthmus.edge.own_clips import budget as budgets
from isthmus.edge.own_clips.own_clips import OwnClips
from isthmus.edge.student.signed import Installed
from isthmus.edge.student.slot import LoadTest, StudentSlot
from isthmus.edge.student.trial import try_student
from isthmus.edge.student.trust import Refused
from isthmus.proto.errors import IsthmusError, StorageFull, Unauthenticated, WrongState
from isthmus.proto.messages import Enrolment, JobStatus


class Stopped(IsthmusError):
    """The run ended without a student; the message says why. The next start tries again."""


class Runtime:
    """Runs one device. ``selection`` are the clips that prototypes are made of; their labels are never read.

    Raises Corrupt if a file of the state folder cannot be read.

    >>> runtime = Runtime(RunConfig("kiosk"), DeviceState(folder), link, plan.selection)
    >>> runtime.state.phase.name  # ``runtime.run()`` enrols, personalises and returns when the device can serve
    'ENROL'
    """

    def __init__(
        self,
        config: RunConfig,
        device: DeviceState,
        link: Link,
        selection: Sequence[ClipRef],
        *,
        observer: Observer | None = None,
        clock: Clock = time.monotonic,
        unix_clock: Clock = time.time,
        cpu_clock: Clock = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
        trial: LoadTest = try_student,
    ) -> None:
        self.config = config
        self.link = link
        self.estimate = LinkEstimate()
        self.record = Record()
        self.observer = observer or Observer()
        self.clock = clock
        self.cpu_clock = cpu_clock
        self._device = device
        self._sleep = sleep
        self._jitter = jitter
        self._actions: deque[events.Action] = deque()
        self._trouble = ""
        self._wait_until_s: float | None = None
        self._changing = threading.RLock()
        self._patient = False
        self._uploads = Uploads(config, device, link, unix_clock)
        self._performer = Performer(
            config,
            device,
            link,
            selection,
            self._uploads,
            record=self.record,
            observer=self.observer,
            clock=clock,
            unix_clock=unix_clock,
            jitter=jitter,
            trial=trial,
            on_transfer=self._observe_transfer,
            on_damage=self.damage,
        )
        self.state = device.agent()
        enrolment = device.enrolment()
        if enrolment is not None:
            if device.budget() is None:  # Enrolled by a version before 0.1.0, which pinned no rounds.
                device.save_budget(budgets.pinned(None, enrolment.rounds))
            self._performer.use(enrolment)
        elif self.state.phase is not behaviour.Phase.ENROL:
            self.state = behaviour.enrol_anew(self.state)
        if device.budget() is not None:
            self._uploads.budget()  # Refuses choices that do not fit before anything is done.

    @property
    def enrolment(self) -> Enrolment:
        """Raises WrongState before the device has enrolled."""
        return self._performer.enrolment

    @property
    def slot(self) -> StudentSlot:
        """Raises WrongState before the device has enrolled: the slot needs the pinned key."""
        return self._performer.slot

    @property
    def clips(self) -> OwnClips:
        """The selection clips. Raises WrongState before the device has enrolled: students encode them."""
        return self._performer.clips

    @property
    def spec(self) -> InputSpec:
        return self._performer.spec

    @property
    def affordable(self) -> bool:
        """Whether the person's privacy budget allows one more upload."""
        return self._uploads.affordable

    def personalise_again(self, *, following: str = "") -> None:
        """Forget a finished personalisation, so that ``run`` starts another with the active student.

        ``following``: the offered release that the device follows so; see ``note_moved``. Raises StorageFull.
        """
        self._uploads.clear()
        with self._changing:
            state = behaviour.personalise_again(self.state)
            if following:
                state = behaviour.moved(state, following)
            self._device.save_agent(state)
            self.state = state

    def note_moved(self, release: str) -> None:
        """Remember that the offer of a release was followed, or is what the device uses already."""
        with self._changing:
            state = behaviour.moved(self.state, release)
            self._save(state)
            self.state = state

    def run(self, until: behaviour.Phase = behaviour.Phase.SERVE, *, patient: bool = False) -> behaviour.State:
        """Follow the agent until it reaches ``until`` or serves; return its state.

        ``patient`` tries everything again until it succeeds. Without it the run ends after a few errors that are not
        the link's, with ``failure`` in the state; the next start continues. Raises Stopped if there is then no student
        to answer with.
        """
        self._patient = patient
        if not self.check_student():
            self._actions.clear()
        self._dispatch(events.Started(self._uploads.most_rounds()))
        while self._actions and (self.state.phase is not until or self.state.repair_id):
            if self._out_of_patience():
                break
            action = self._actions.popleft()
            match action:
                case events.Serve():
                    break
                case events.Wait(until_s):
                    self._wait(until_s)
                    event: events.Event | None = events.Tick()
                case _:
                    event = self._attempt(action)
            if event is not None:
                self._dispatch(event)
            if isinstance(event, events.Accepted) and event.round == 0:
                self.observer.on_accepted()
        self._actions.clear()
        if self._out_of_patience() and not self.state.active_id:
            raise Stopped(self.state.failure)
        return self.state

    def check_student(self) -> bool:
        """Compare the active student's files with its signed manifest; return whether they agree.

        If they do not, a sound base student takes its place, and the next ``run`` fetches the damaged one again.
        """
        active_id, base_id = self.state.active_id, self.state.base_id
        if not self._performer.has_enrolled or not active_id or self.slot.is_sound(active_id):
            return True
        substitute_id = base_id if base_id != active_id and base_id and self.slot.is_sound(base_id) else ""
        if substitute_id:
            self.slot.activate(substitute_id)
        self._dispatch(events.Damaged(active_id, substitute_id))
        return False

    def rollback(self) -> Installed:
        """Go back to the student that was in use before, at any time while the device runs.

        Raises WrongState if there is none or the device is just replacing its student, Corrupt for damage.
        """
        with self._changing:
            if self.state.phase is behaviour.Phase.SWAP or self.state.repair_id:
                raise WrongState("the device is replacing its student; roll back when that is done")
            installed, state = roll_back(self.slot, self.state)
            self._save(state)
            self.state = state
            return installed

    def student_to_use(self) -> str:
        """Return the id of the student in use, and count its use before it is loaded.

        A new student that has ended this process too often is given up first, and the one before takes its place.
        Raises WrongState if there is no student.
        """
        student_id = self.state.active_id
        if not student_id:
            raise WrongState("there is no student yet")
        try:
            self.slot.started(student_id)
        except Refused as error:
            self._withdraw(student_id, str(error))
        return self.state.active_id

    def note_answer(self, student_id: str, cpu_ms: float) -> None:
        """Count an answer of the student in use. One that is too slow is given up: see ``state`` for the next one.

        ``cpu_ms``: processor time of its encoders for the clip.
        """
        try:
            self.slot.answered(student_id, cpu_ms)
        except Refused as error:
            self._withdraw(student_id, str(error))

    def _withdraw(self, student_id: str, reason: str) -> None:
        with self._changing:
            substitute_id = self.slot.withdraw(student_id, (self.state.base_id,))
            if substitute_id:
                state = behaviour.withdrawn(self.state, student_id, substitute_id, reason)
                self._save(state)
                self.state = state

    def pause(self) -> tuple[float | None, str]:
        """Return for how many seconds the device is waiting now (None: it is not) and why."""
        until_s = self._wait_until_s
        return (None, "") if until_s is None else (round(max(0.0, until_s - self.clock()), 1), self._trouble)

    def note_link(self, event: events.Failed | events.Answered | events.Tick) -> behaviour.Answering:
        """Report the link, or that time has passed, to the agent while serving; return how to answer now."""
        self._dispatch(event)
        self._actions.clear()
        return behaviour.answering(self.state)

    def link_failed(self, error: IsthmusError) -> None:
        """Report the error to the agent while serving; return when the link is to be tried again."""
        self._trouble = str(error)
        self._dispatch(events.Failed(error, self._jitter()))
        if self.state.phase is not behaviour.Phase.SERVE:
            self._wait(self.clock() + pauses.backoff_s(1, self._jitter()))
        while self._actions:
            action = self._actions.popleft()
            if isinstance(action, events.Wait):
                self._wait(action.until_s)
                self._dispatch(events.Tick())

    def damage(self, damage: Damage) -> None:
        """Record a clip that cannot be used; each is reported once."""
        if damage.name not in self.record.damaged:
            self.record.damaged[damage.name] = damage.reason
            self.observer.on_damage(damage)

    def close(self) -> None:
        if self._performer.has_enrolled:
            with contextlib.suppress(IsthmusError):  # On a full disk the next starts are counted from here.
                self.slot.ended()
        self._uploads.close()
        self.link.close()

    def _out_of_patience(self) -> bool:
        return not self._patient and self.state.refusals > pauses.MOST_REFUSALS

    def _dispatch(self, event: events.Event) -> None:
        with self._changing:
            before = self.state
            state, actions = step(before, event, self.clock())
            if state != before:
                self._save(state)
            self.state = state
        if 0 < state.uploaded_round != before.uploaded_round:
            self._uploads.acknowledge(state.uploaded_round)
        if state.phase is behaviour.Phase.SERVE and before.phase is not behaviour.Phase.SERVE:
            self._uploads.clear()  # Until now round 0 could have had to start another job.
        self._actions.extend(actions)

    def _save(self, state: behaviour.State) -> None:
        """Write the state; on a full disk wait for room."""
        tries = 0
        while True:
            tries += 1
            try:
                self._device.save_agent(state)
            except StorageFull as error:
                if tries > pauses.MOST_REFUSALS and not self._patient:
                    raise
                self._trouble = str(error)
                self._wait(self.clock() + pauses.backoff_s(tries, self._jitter()))
            else:
                return

    def _attempt(self, action: events.Action) -> events.Event | None:
        stage = self._stage(action)
        self.observer.on_stage(stage)
        began_s, before_bytes = self.clock(), self._performer.came_bytes()
        try:
            return self._performer.perform(action, self.state, self._job_changed)
        except IsthmusError as error:
            if isinstance(error, Unauthenticated) and self._performer.has_enrolled:
                error = Unauthenticated(f"{error}; 'isthmus edge enrol --again' makes this device known to it again")
            self._trouble = str(error)
            return events.Failed(error, self._jitter(), progress=self._performer.came_bytes() > before_bytes)
        finally:
            self.record.add(stage, self.clock() - began_s)

    def _job_changed(self, status: JobStatus) -> bool:
        """Report a watched job to the agent; return whether there is something to do."""
        self._dispatch(events.JobChanged(status, self._jitter()))
        if self._actions:
            self._trouble = self.state.failure
        return bool(self._actions)

    def _observe_transfer(self, transferred_bytes: int, took_s: float) -> None:
        # The only bulk transfer of a device. It is a download, and the best estimate for uploads until one is measured.
        self.estimate = observe_transfer(self.estimate, transferred_bytes, took_s)

    def _wait(self, until_s: float) -> None:
        self._wait_until_s = until_s
        self.observer.on_wait(max(0.0, until_s - self.clock()), self._trouble)
        self._sleep(max(0.0, until_s - self.clock()))  # The observer may have used some of the time.
        self._wait_until_s = None

    def _stage(self, action: events.Action) -> str:
        purpose = self.state.purpose.value
        match action:
            case events.Fetch() | events.Verify() | events.Swap():
                return f"{type(action).__name__.lower()}_{purpose}"
            case events.MakePrototypes(round=round):
                return "make_prototypes" if round == 0 else "make_prototypes_again"
            case _:
                return type(action).__name__.lower()


def roll_back(slot: StudentSlot, state: behaviour.State) -> tuple[Installed, behaviour.State]:
    """Exchange the student in use with the one before; return it and the agent's state, which the caller saves.

    Raises WrongState if there is none, Corrupt for damage.
    """
    if slot.is_sound(state.active_id):
        slot.activate(state.active_id)  # Changes something only if a rollback was killed before the caller saved.
    installed = slot.rollback()
    return installed, behaviour.rolled_back(state, installed.manifest.student_id)
