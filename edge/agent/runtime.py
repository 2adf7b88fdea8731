"""The wiring: performs the agent's actions with real files, clock and link, and tells the agent what happened.

One thread. Every decision is the agent's (agent.py); its state is on disk before its next action begins, so the
process may be killed at any point and goes on when it is started again.
"""

import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent import behaviour
from isthmus.edge.agent.device_state import DeviceState, LedgerEntry
from isthmus.edge.capture.sources import Clock
from isthmus.edge.link.compression import LinkEstimate, observe_transfer
from isthmus.edge.link.interface import Link
from isthmus.edge.link.outbox import Entry, Outbox
from isthmus.edge.own_clips.own_clips import OwnClips
from isthmus.edge.own_clips.selection_pass import PrototypeChoices
from isthmus.edge.student.download import Tally, fetch_student
from isthmus.edge.student.encoder import load_test
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.convert import prototypes_from_pb, prototypes_to_pb
from isthmus.proto.errors import InvalidInput, IsthmusError, WrongState
from isthmus.proto.messages import Enrolment, JobStatus
from isthmus.proto.v1 import isthmus_pb2 as pb


class Stopped(IsthmusError):
    """The agent cannot go on without a person; the message says why."""


@dataclass(frozen=True)
class RunConfig:
    """What a person chooses. ``rounds`` 0 leaves it to the cloud. ``guard``: only a new student that pays is taken.
    ``habits``: answers know how often this user is in each state.

    >>> RunConfig("kiosk", guard=False).habits
    True
    """

    device_name: str
    enrolment_key: str = ""
    seed: int = 0
    rounds: int = 0
    guard: bool = True
    habits: bool = True
    choices: PrototypeChoices = field(default_factory=PrototypeChoices)


@dataclass
class Observer:
    """Callbacks for whoever watches; each default does nothing.

    ``on_accepted`` is called once the round-0 prototypes are with the cloud: time to work while it learns.
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
    """What a run has seen, for its report. ``stage_s``: wall seconds by stage of the device."""

    stage_s: dict[str, float] = field(default_factory=dict)
    job: JobStatus | None = None
    interim_ids: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    downloads: dict[str, Tally] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + seconds


class Runtime:
    """Runs one device. ``selection`` are the clips that prototypes are made of; their labels are never read.

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
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.config = config
        self.link = link
        self.estimate = LinkEstimate()
        self.record = Record()
        self.observer = observer or Observer()
        self.clock = clock
        self._device = device
        self._selection = selection
        self._unix_clock = unix_clock
        self._sleep = sleep
        self._jitter = jitter
        self._outbox = Outbox(device.root / "outbox.sqlite")
        self._actions: deque[behaviour.Action] = deque()
        self._trouble = ""
        self._slot: StudentSlot | None = None
        self._enrolment: Enrolment | None = None
        self._clips: OwnClips | None = None
        self.state = device.agent()
        enrolment = device.enrolment()
        if enrolment is not None:
            self._use(enrolment)

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
        """The selection clips. Raises WrongState before the device has enrolled: they are encoded by students."""
        if self._clips is None:
            raise WrongState("this device has not enrolled yet")
        return self._clips

    @property
    def spec(self) -> InputSpec:
        return InputSpec.from_json(self.enrolment.input_spec_json)

    def personalise_again(self) -> None:
        """Forgets a finished personalisation, so that ``run`` starts another with the present student."""
        self._outbox.clear()
        self.state = behaviour.personalise_again(self.state)
        self._device.save_agent(self.state)

    def run(self, until: behaviour.Phase = behaviour.Phase.SERVE) -> behaviour.State:
        """Follows the agent until it reaches ``until`` or serves. Raises Stopped where a person is needed."""
        self._dispatch(behaviour.Started())
        while self._actions and self.state.phase is not until:
            action = self._actions.popleft()
            match action:
                case behaviour.Serve():
                    break
                case behaviour.Stop(reason):
                    raise Stopped(reason)
                case behaviour.Wait(until_s):
                    self._wait(until_s)
                    event: behaviour.Event | None = behaviour.Tick()
                case _:
                    event = self._attempt(action)
            if event is not None:
                self._dispatch(event)
            if isinstance(event, behaviour.Accepted) and event.round == 0:
                self.observer.on_accepted()
        self._actions.clear()
        return self.state

    def note_link(self, event: behaviour.Failed | behaviour.Answered | behaviour.Tick) -> behaviour.Answering:
        """While serving: tells the agent how the link did, or that time has passed; returns how to answer now."""
        self._dispatch(event)
        self._actions.clear()
        return behaviour.answering(self.state)

    def link_failed(self, error: IsthmusError) -> None:
        """While serving: tells the agent, and returns when it says to try the link again."""
        self._trouble = str(error)
        self._dispatch(behaviour.Failed(error, self._jitter()))
        while self._actions:
            action = self._actions.popleft()
            if isinstance(action, behaviour.Wait):
                self._wait(action.until_s)
                self._dispatch(behaviour.Tick())

    def damage(self, damage: Damage) -> None:
        """Takes note of a clip that cannot be used; each is told once."""
        if damage.name not in self.record.damaged:
            self.record.damaged[damage.name] = damage.reason
            self.observer.on_damage(damage)

    def close(self) -> None:
        self._outbox.close()
        self.link.close()

    def _dispatch(self, event: behaviour.Event) -> None:
        before = self.state
        self.state, actions = behaviour.step(before, event, self.clock())
        if self.state != before:
            self._device.save_agent(self.state)
        if self.state.uploaded_round > before.uploaded_round:
            self._outbox.acknowledge(_entry_name(self.state.uploaded_round))
        self._actions.extend(actions)

    def _attempt(self, action: behaviour.Action) -> behaviour.Event | None:
        stage = self._stage(action)
        self.observer.on_stage(stage)
        began_s = self.clock()
        try:
            return self._perform(action)
        except IsthmusError as error:
            self._trouble = str(error)
            return behaviour.Failed(error, self._jitter())
        finally:
            self.record.add(stage, self.clock() - began_s)

    def _perform(self, action: behaviour.Action) -> behaviour.Event | None:
        match action:
            case behaviour.Enrol():
                return self._enrol()
            case behaviour.Fetch(student_id):
                return self._fetch(student_id)
            case behaviour.Verify(student_id):
                return self._verify(student_id)
            case behaviour.Judge(old_id, new_id):
                return self._judge(old_id, new_id)
            case behaviour.Swap(student_id):
                if self.state.purpose is behaviour.Purpose.FINAL:
                    # No guard may have run this student on the clips, or its run was cut short.
                    self.clips.learn_habits(student_id, in_use=self._in_use())
                self.slot.activate(student_id)
                self.slot.prune(keep=(self.state.base_id, student_id))
                return behaviour.Swapped(student_id)
            case behaviour.MakePrototypes(student_id, round):
                return self._fill_outbox(student_id, round)
            case behaviour.Upload(job_id, round):
                return self._upload(job_id, round)
            case behaviour.Watch(job_id):
                return self._watch(job_id)
            case behaviour.Wait() | behaviour.Serve() | behaviour.Stop():
                return None

    def _enrol(self) -> behaviour.Event:
        if self._enrolment is None:
            enrolment = self.link.enrol(self.config.device_name, self.config.enrolment_key)
            try:
                InputSpec.from_json(enrolment.input_spec_json)
            except ValueError as error:
                raise InvalidInput(f"the cloud's {error}") from error
            self._device.save_enrolment(enrolment)
            self._use(enrolment)
        return behaviour.Enrolled()

    def _use(self, enrolment: Enrolment) -> None:
        self._enrolment = enrolment
        self._slot = StudentSlot(self._device.root / "students", enrolment.signing_public_key, load_test)
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

    def _fetch(self, student_id: str) -> behaviour.Event:
        if student_id and self.slot.is_sound(student_id):
            return behaviour.Fetched(student_id)
        stage = f"student_{self.state.purpose.value}"
        began_s = self.clock()
        tally = self.record.downloads.setdefault(stage, Tally())
        before_bytes = tally.came_bytes
        fetched_id = fetch_student(self.link, self.slot, student_id, self.observer.on_bytes, tally)
        fetched_bytes = tally.came_bytes - before_bytes
        # The one bulk transfer a device makes. It goes down, and stands for the way up until there is better.
        self.estimate = observe_transfer(self.estimate, fetched_bytes, self.clock() - began_s)
        return behaviour.Fetched(fetched_id)

    def _verify(self, student_id: str) -> behaviour.Event:
        manifest = self.slot.verify(student_id).manifest
        known = self.enrolment
        if (manifest.classes, manifest.feature_width, manifest.input_spec_json) != (
            known.classes,
            known.feature_width,
            known.input_spec_json,
        ):
            raise InvalidInput("the student's classes, width or input are not those this device enrolled with")
        if self.state.purpose is behaviour.Purpose.INTERIM:
            self.record.interim_ids.append(student_id)
        elif manifest.kind == "interim":
            raise InvalidInput("the cloud offers an unfinished student as a finished one")
        return behaviour.Verified(student_id)

    def _judge(self, old_id: str, new_id: str) -> behaviour.Event:
        if not self.config.guard:
            return behaviour.Judged(new_id, True, "not compared with the student before: the guard is off")
        return behaviour.Judged(new_id, *self.clips.compare(old_id, new_id, in_use=self._in_use()))

    def _fill_outbox(self, student_id: str, round: int) -> behaviour.Event:
        """Prototypes that wait already are kept: making them again would spend the privacy budget twice."""
        if self._outbox.get(_entry_name(round)) is None:
            prototypes = self.clips.prototypes(student_id, in_use=self._in_use())
            payload = prototypes_to_pb(prototypes).SerializeToString()
            self._outbox.put(Entry(_entry_name(round), uuid.uuid4().hex, payload, self._unix_clock()))
        return behaviour.Encoded(round)

    def _upload(self, job_id: str, round: int) -> behaviour.Event:
        entry = self._outbox.get(_entry_name(round))
        if entry is None:
            raise WrongState(f"the prototypes of round {round} are gone from the outbox; run again with --again")
        prototypes = prototypes_from_pb(pb.Prototypes.FromString(entry.payload))
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
            status = self.link.start_personalisation(
                entry.idempotency_key, prototypes, rounds=self.config.rounds, seed=self.config.seed
            )
        self.record.job = status
        return behaviour.Accepted(round, status)

    def _watch(self, job_id: str) -> behaviour.Event | None:
        for status in self.link.watch_job(job_id):
            self.record.job = status
            self.observer.on_job(status)
            self._dispatch(behaviour.JobChanged(status))
            if self._actions:
                return None
        return behaviour.WatchEnded(self._jitter())

    def _wait(self, until_s: float) -> None:
        seconds = max(0.0, until_s - self.clock())
        self.observer.on_wait(seconds, self._trouble)
        self._sleep(seconds)

    def _stage(self, action: behaviour.Action) -> str:
        purpose = self.state.purpose.value
        match action:
            case behaviour.Fetch() | behaviour.Verify() | behaviour.Swap():
                return f"{type(action).__name__.lower()}_{purpose}"
            case behaviour.MakePrototypes(round=round):
                return "make_prototypes" if round == 0 else "make_prototypes_again"
            case _:
                return type(action).__name__.lower()


def _entry_name(round: int) -> str:
    return f"prototypes/{round}"
