"""The wiring: performs the agent's actions with real files, clock and link, and reports the results to the agent.

Every decision is the agent's (behaviour.py). Its state is on disk before its next action begins, so the process may be
killed at any point and continues when it is started again. ``run`` may be called in a thread of its own; meanwhile
other threads only read ``state``, ask for ``pause`` and call ``rollback``.
"""

import contextlib
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_state import DeviceState, LedgerEntry
from isthmus.edge.behaviour import events
from isthmus.edge.behaviour import step as behaviour
from isthmus.edge.capture.sources import Clock
from isthmus.edge.link.compression import LinkEstimate, observe_transfer
from isthmus.edge.link.interface import Link
from isthmus.edge.link.outbox import Entry, Outbox
from isthmus.edge.own_clips import budget as budgets
from isthmus.edge.own_clips.budget import Budget
from isthmus.edge.own_clips.own_clips import OwnClips
from isthmus.edge.own_clips.selection_pass import PrototypeChoices
from isthmus.edge.student.download import Tally, fetch_student
from isthmus.edge.student.slot import Installed, LoadTest, StudentSlot
from isthmus.edge.student.trial import try_student
from isthmus.edge.student.trust import Refused
from isthmus.proto.convert import prototypes_from_pb, prototypes_to_pb
from isthmus.proto.errors import InvalidInput, IsthmusError, StorageFull, Unauthenticated, WrongState
from isthmus.proto.limits import MAX_ROUNDS
from isthmus.proto.messages import Enrolment, JobStatus
from isthmus.proto.v1 import isthmus_pb2 as pb


class Stopped(IsthmusError):
    """The run ended without a student; the message says why. The next start tries again."""


@dataclass(frozen=True)
class RunConfig:
    """A person's choices for a run.

    ``rounds``: the most uploads of one personalisation; 0 keeps the number that was pinned at enrolment.
    ``epsilon_budget``: the most epsilon that all uploads of this device may spend; None keeps the known budget.
    ``guard``: a new student is accepted only if it is good enough. ``habits``: answers use how often this user is in
    each state. Without ``ask_cloud`` live clips are answered by the device alone, so no features leave it.

    >>> RunConfig("kiosk", guard=False).habits
    True
    """

    device_name: str
    enrolment_key: str = ""
    seed: int = 0
    rounds: int = 0
    guard: bool = True
    habits: bool = True
    epsilon_budget: float | None = None
    choices: PrototypeChoices = field(default_factory=PrototypeChoices)
    ask_cloud: bool = True


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
        self._selection = selection
        self._unix_clock = unix_clock
        self._sleep = sleep
        self._jitter = jitter
        self._trial = trial
        self._outbox = Outbox(device.root / "outbox.sqlite")
        self._actions: deque[events.Action] = deque()
        self._trouble = ""
        self._wait_until_s: float | None = None
        self._changing = threading.RLock()
        self._patient = False
        self._slot: StudentSlot | None = None
        self._enrolment: Enrolment | None = None
        self._clips: OwnClips | None = None
        self.state = device.agent()
        enrolment = device.enrolment()
        if enrolment is not None:
            if device.budget() is None:  # Enrolled by a version before 0.1.0, which pinned no rounds.
                device.save_budget(budgets.pinned(None, enrolment.rounds))
            self._use(enrolment)
        elif self.state.phase is not behaviour.Phase.ENROL:
            self.state = behaviour.enrol_anew(self.state)
        if device.budget() is not None:
            self._budget()  # Refuses choices that do not fit before anything is done.

    @property
    def enrolment(self) -> Enrolment:
        """Raises WrongState before the device has enrolled."""
        if self._enrolment is None:
            raise WrongState("this device has not enrolled yet")
        return self._enrolment

    @property
    def slot(self) -> StudentSlot:
        """Raises WrongState before the device has enrolled: the slot needs the pinned key."""
        if self._slot is None:
            raise WrongState("this device has not enrolled yet")
        return self._slot

    @property
    def clips(self) -> OwnClips:
        """The selection clips. Raises WrongState before the device has enrolled: students encode them."""
        if self._clips is None:
            raise WrongState("this device has not enrolled yet")
        return self._clips

    @property
    def spec(self) -> InputSpec:
        return InputSpec.from_json(self.enrolment.input_spec_json)

    @property
    def affordable(self) -> bool:
        """Whether the person's privacy budget allows one more upload."""
        if self._device.budget() is None:
            return True  # The enrolment pins it; nothing may be written before that.
        try:
            budgets.check(self._budget(), self._spent(), self.config.choices.noise)
        except budgets.BudgetSpent:
            return False
        return True

    def personalise_again(self) -> None:
        """Forget a finished personalisation, so that ``run`` starts another with the active student."""
        self._outbox.clear()
        self.state = behaviour.personalise_again(self.state)
        self._device.save_agent(self.state)

    def run(self, until: behaviour.Phase = behaviour.Phase.SERVE, *, patient: bool = False) -> behaviour.State:
        """Follow the agent until it reaches ``until`` or serves; return its state.

        ``patient`` tries everything again until it succeeds. Without it the run ends after a few errors that are not
        the link's, with ``failure`` in the state; the next start continues. Raises Stopped if there is then no student
        to answer with.
        """
        self._patient = patient
        if not self.check_student():
            self._actions.clear()
        self._dispatch(events.Started(self._most_rounds()))
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
        if self._slot is None or not active_id or self._slot.is_sound(active_id):
            return True
        substitute_id = base_id if base_id != active_id and base_id and self._slot.is_sound(base_id) else ""
        if substitute_id:
            self._slot.activate(substitute_id)
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
            self._wait(self.clock() + behaviour.backoff_s(1, self._jitter()))
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
        if self._slot is not None:
            with contextlib.suppress(IsthmusError):  # On a full disk the next starts are counted from here.
                self._slot.ended()
        self._outbox.close()
        self.link.close()

    def _out_of_patience(self) -> bool:
        return not self._patient and self.state.refusals > behaviour.MOST_REFUSALS

    def _dispatch(self, event: events.Event) -> None:
        with self._changing:
            before = self.state
            state, actions = behaviour.step(before, event, self.clock())
            if state != before:
                self._save(state)
            self.state = state
        if 0 < state.uploaded_round != before.uploaded_round:
            self._outbox.acknowledge(_entry_name(state.uploaded_round))
        if state.phase is behaviour.Phase.SERVE and before.phase is not behaviour.Phase.SERVE:
            self._outbox.clear()  # Until now round 0 could have had to start another job.
        self._actions.extend(actions)

    def _save(self, state: behaviour.State) -> None:
        """Write the state; on a full disk wait for room."""
        tries = 0
        while True:
            tries += 1
            try:
                self._device.save_agent(state)
            except StorageFull as error:
                if tries > behaviour.MOST_REFUSALS and not self._patient:
                    raise
                self._trouble = str(error)
                self._wait(self.clock() + behaviour.backoff_s(tries, self._jitter()))
            else:
                return

    def _attempt(self, action: events.Action) -> events.Event | None:
        stage = self._stage(action)
        self.observer.on_stage(stage)
        began_s, before_bytes = self.clock(), self._came_bytes()
        try:
            return self._perform(action)
        except IsthmusError as error:
            if isinstance(error, Unauthenticated) and self._enrolment is not None:
                error = Unauthenticated(f"{error}; 'isthmus edge enrol --again' makes this device known to it anew")
            self._trouble = str(error)
            return events.Failed(error, self._jitter(), progress=self._came_bytes() > before_bytes)
        finally:
            self.record.add(stage, self.clock() - began_s)

    def _came_bytes(self) -> int:
        return sum(tally.came_bytes for tally in self.record.downloads.values())

    def _perform(self, action: events.Action) -> events.Event | None:
        match action:
            case events.Enrol():
                return self._enrol()
            case events.Fetch(student_id):
                return self._fetch(student_id)
            case events.Verify(student_id):
                return self._verify(student_id)
            case events.Judge(old_id, new_id):
                return self._judge(old_id, new_id)
            case events.Swap(student_id):
                if self.state.purpose is behaviour.Purpose.FINAL:
                    self.slot.started(student_id)
                    # No guard may have run this student on the clips, or its run was cut short.
                    self.clips.learn_user(student_id, in_use=self._in_use())
                    self.slot.finished(student_id)
                self.slot.activate(student_id)
                self.slot.prune(keep=(self.state.base_id, student_id))
                return events.Swapped(student_id)
            case events.Repair(student_id):
                return self._repair(student_id)
            case events.MakePrototypes(student_id, round):
                return self._fill_outbox(student_id, round)
            case events.Upload(job_id, round):
                return self._upload(job_id, round)
            case events.Watch(job_id):
                return self._watch(job_id)
            case events.Wait() | events.Serve():
                return None

    def _enrol(self) -> events.Event:
        if self._enrolment is None:
            self._use(_enrolled(self.config, self._device, self.link))
        active_id = self.state.active_id
        keeps = bool(active_id) and self.slot.is_sound(active_id)
        if not keeps:
            self._outbox.clear()  # Made by a student, and for classes, that may be unknown to this cloud.
        return events.Enrolled(keeps, self._most_rounds())

    def _use(self, enrolment: Enrolment) -> None:
        self._enrolment = enrolment
        self._slot = StudentSlot(
            self._device.root / "students",
            enrolment.signing_public_key,
            self._trial,
            device_id=enrolment.device_id,
            clock=self._unix_clock,
        )
        self._clips = OwnClips(
            self._selection,
            self._slot,
            self.spec,
            self._device,
            self.config.choices,
            classes=len(enrolment.classes),
            seed=self.config.seed,
            use_habits=self.config.habits,
            clock=self.clock,
            on_clip=lambda done, total: self.observer.on_clip(done, total),
            on_damage=self.damage,
        )
        self.link.authenticate(enrolment.token)

    def _in_use(self) -> tuple[str, ...]:
        return self.state.base_id, self.state.active_id

    def _budget(self) -> Budget:
        """Return the person's budget with this run's choices, and write it if they change it. Raises BudgetSpent."""
        stored = self._device.budget()
        known = budgets.pinned(stored, 0)
        choices = self.config.choices
        budget = budgets.chosen(
            known, rounds=self.config.rounds, noise=choices.noise, epsilon=self.config.epsilon_budget
        )
        if budget != stored:
            self._device.save_budget(budget)
        return budget

    def _most_rounds(self) -> int:
        if self._device.budget() is None:
            return self.config.rounds or MAX_ROUNDS  # Pinned at the enrolment, before any upload.
        return budgets.allowed_rounds(self._budget(), self.config.rounds)

    def _spent(self) -> float:
        return budgets.spent(entry.epsilon for entry in self._device.ledger())

    def _fetch(self, student_id: str) -> events.Event:
        if student_id and self.slot.is_sound(student_id):
            if self.state.purpose is not behaviour.Purpose.BASE:
                self.slot.check_newest(student_id)
            return events.Fetched(student_id)
        return events.Fetched(self._download(student_id, f"student_{self.state.purpose.value}"))

    def _download(self, student_id: str, stage: str, *, again: bool = False) -> str:
        began_s = self.clock()
        tally = self.record.downloads.setdefault(stage, Tally())
        before_bytes = tally.came_bytes
        fetched_id = fetch_student(self.link, self.slot, student_id, self.observer.on_bytes, tally, again=again)
        fetched_bytes = tally.came_bytes - before_bytes
        # The only bulk transfer of a device. It is a download, and the best estimate for uploads until one is measured.
        self.estimate = observe_transfer(self.estimate, fetched_bytes, self.clock() - began_s)
        return fetched_id

    def _verify(self, student_id: str) -> events.Event:
        manifest = self.slot.verify(student_id).manifest
        known = self.enrolment
        if (manifest.classes, manifest.feature_width, manifest.input_spec_json) != (
            known.classes,
            known.feature_width,
            known.input_spec_json,
        ):
            reason = "the student's classes, width or input are not those this device enrolled with"
            self.slot.refuse(student_id, reason)
            raise InvalidInput(reason)
        if self.state.purpose is behaviour.Purpose.INTERIM:
            self.record.interim_ids.append(student_id)
        elif manifest.kind == "interim":
            reason = "the cloud offers an unfinished student as a finished one"
            self.slot.refuse(student_id, reason)
            raise InvalidInput(reason)
        return events.Verified(student_id)

    def _repair(self, student_id: str) -> events.Event:
        if not self.slot.is_sound(student_id):
            self._download(student_id, "student_repair", again=True)
        self.slot.verify(student_id)
        self.slot.activate(student_id)
        return events.Repaired(student_id)

    def _judge(self, old_id: str, new_id: str) -> events.Event:
        self.slot.started(new_id)
        if not self.config.guard:
            self.clips.check_runs(new_id)
            self.slot.finished(new_id)
            return events.Judged(new_id, True, "not compared with the student before: the guard is off")
        accept, reason = self.clips.compare(old_id, new_id, in_use=self._in_use())
        self.slot.finished(new_id)
        if not accept:
            self.slot.refuse(new_id, reason)
        return events.Judged(new_id, accept, reason)

    def _fill_outbox(self, student_id: str, round: int) -> events.Event:
        """Make the prototypes. Waiting ones are kept: making them again would spend the privacy budget twice."""
        if self._outbox.get(_entry_name(round)) is None:
            if self.state.purpose is behaviour.Purpose.INTERIM:
                self.slot.started(student_id)
            budgets.check(self._budget(), self._spent(), self.config.choices.noise)
            prototypes = self.clips.prototypes(student_id, in_use=self._in_use())
            if self.state.purpose is behaviour.Purpose.INTERIM:
                self.slot.finished(student_id)
            payload = prototypes_to_pb(prototypes).SerializeToString()
            self._outbox.put(Entry(_entry_name(round), uuid.uuid4().hex, payload, self._unix_clock()))
        return events.Encoded(round)

    def _upload(self, job_id: str, round: int) -> events.Event:
        entry = self._outbox.get(_entry_name(round))
        if entry is None:
            raise behaviour.NothingToSend(f"the prototypes of round {round + 1} are gone from the outbox")
        prototypes = prototypes_from_pb(pb.Prototypes.FromString(entry.payload))
        budget = self._budget()
        if all(known.idempotency_key != entry.idempotency_key for known in self._device.ledger()):
            budgets.check(budget, self._spent(), prototypes.epsilon)
        self._device.add_to_ledger(
            LedgerEntry(
                idempotency_key=entry.idempotency_key,
                round=round,
                mode=prototypes.mode.value,
                rows=len(prototypes.sizes_K),
                smallest=int(prototypes.sizes_K.min()),
                sizes=tuple(int(size) for size in prototypes.sizes_K),
                message_bytes=len(entry.payload),
                epsilon=prototypes.epsilon,
                sent_s=self._unix_clock(),
            )
        )
        if job_id:
            status = self.link.upload_prototypes(job_id, round, prototypes)
        else:
            # Another job with the same prototypes needs another key, and reveals nothing new.
            jobs = self.state.jobs
            key = f"{entry.idempotency_key}-{jobs}" if jobs else entry.idempotency_key
            rounds = budgets.affordable_rounds(budget, self._spent(), prototypes.epsilon, self.state.most_rounds)
            status = self.link.start_personalisation(key, prototypes, rounds=rounds, seed=self.config.seed)
        self.record.job = status
        return events.Accepted(round, status)

    def _watch(self, job_id: str) -> events.Event | None:
        for status in self.link.watch_job(job_id):
            self.record.job = status
            self.observer.on_job(status)
            self._dispatch(events.JobChanged(status, self._jitter()))
            if self._actions:
                self._trouble = self.state.failure
                return None
        return events.WatchEnded(self._jitter())

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


def enrol_anew(config: RunConfig, device: DeviceState, link: Link) -> str:
    """Give the device a new identity and return its id. Ledger and budget stay, and so do sound students.

    Raises what the link raises; the old identity is then kept.
    """
    state = device.agent()
    enrolment = _enrolled(config, device, link)
    if state != behaviour.State():
        device.save_agent(behaviour.enrol_anew(state))
    return enrolment.device_id


def roll_back(slot: StudentSlot, state: behaviour.State) -> tuple[Installed, behaviour.State]:
    """Exchange the student in use with the one before; return it and the agent's state, which the caller saves.

    Raises WrongState if there is none, Corrupt for damage.
    """
    if slot.is_sound(state.active_id):
        slot.activate(state.active_id)  # Changes something only if a rollback was killed before the caller saved.
    installed = slot.rollback()
    return installed, behaviour.rolled_back(state, installed.manifest.student_id)


def _enrolled(config: RunConfig, device: DeviceState, link: Link) -> Enrolment:
    enrolment = link.enrol(config.device_name, config.enrolment_key)
    try:
        InputSpec.from_json(enrolment.input_spec_json)
    except ValueError as error:
        raise InvalidInput(f"the cloud's {error}") from error
    device.save_budget(budgets.pinned(device.budget(), enrolment.rounds))
    device.save_enrolment(enrolment)
    return enrolment


def _entry_name(round: int) -> str:
    return f"prototypes/{round}"
