"""Performs the actions of the device's behaviour with real files and a real link, one at a time."""

from collections.abc import Callable, Sequence

from isthmus.data.clip import ClipRef, Damage
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.enrolling import enrolled
from isthmus.edge.agent.progress import Observer, Record
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.uploads import Uploads
from isthmus.edge.behaviour import events
from isthmus.edge.behaviour.state import Purpose, State
from isthmus.edge.capture.sources import Clock
from isthmus.edge.link.interface import Link
from isthmus.edge.own_clips.own_clips import OwnClips
from isthmus.edge.student.download import Tally, fetch_student
from isthmus.edge.student.slot import LoadTest, StudentSlot
from isthmus.proto.errors import InvalidInput, WrongState
from isthmus.proto.messages import Enrolment, JobStatus, Prototypes


class Performer:
    """Performs actions. ``clock`` is monotonic, ``unix_clock`` returns Unix time, ``jitter`` numbers in [0, 1).

    ``on_transfer`` is called with the bytes and seconds of each download, ``on_damage`` with clips that cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        device: DeviceState,
        link: Link,
        selection: Sequence[ClipRef],
        uploads: Uploads,
        *,
        record: Record,
        observer: Observer,
        clock: Clock,
        unix_clock: Clock,
        jitter: Callable[[], float],
        trial: LoadTest,
        on_transfer: Callable[[int, float], None],
        on_damage: Callable[[Damage], None],
    ) -> None:
        self._config = config
        self._device = device
        self._link = link
        self._selection = selection
        self._uploads = uploads
        self._record = record
        self._observer = observer
        self._clock = clock
        self._unix_clock = unix_clock
        self._jitter = jitter
        self._trial = trial
        self._on_transfer = on_transfer
        self._on_damage = on_damage
        self._enrolment: Enrolment | None = None
        self._slot: StudentSlot | None = None
        self._clips: OwnClips | None = None

    @property
    def has_enrolled(self) -> bool:
        return self._enrolment is not None

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

    def use(self, enrolment: Enrolment) -> None:
        """Work with this identity from now on. Raises Corrupt if what is known of students cannot be read."""
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
            self._config.choices,
            classes=len(enrolment.classes),
            seed=self._config.seed,
            use_habits=self._config.habits,
            clock=self._clock,
            on_clip=lambda done, total: self._observer.on_clip(done, total),
            on_damage=self._on_damage,
        )
        self._link.authenticate(enrolment.token)

    def perform(self, action: events.Action, state: State, on_job: Callable[[JobStatus], bool]) -> events.Event | None:
        """Perform the action and return its success; None if there is nothing to report.

        ``on_job`` is called with the status of a watched job, and returns whether to stop watching. Raises
        IsthmusError if the action fails.
        """
        match action:
            case events.Enrol():
                return self._enrol(state)
            case events.Fetch(student_id):
                return self._fetch(state, student_id)
            case events.Verify(student_id):
                return self._verify(state, student_id)
            case events.Judge(old_id, new_id):
                return self._judge(state, old_id, new_id)
            case events.Swap(student_id):
                return self._swap(state, student_id)
            case events.Repair(student_id):
                return self._repair(student_id)
            case events.MakePrototypes(student_id, round):
                self._uploads.fill(round, lambda: self._prototypes(state, student_id))
                return events.Encoded(round)
            case events.Upload(job_id, round):
                status = self._record.job = self._uploads.send(state, job_id, round)
                return events.Accepted(round, status)
            case events.Watch(job_id):
                return self._watch(job_id, on_job)
            case events.Wait() | events.Serve():
                return None

    def came_bytes(self) -> int:
        """Return the bytes of students that this run has downloaded."""
        return sum(tally.came_bytes for tally in self._record.downloads.values())

    def _enrol(self, state: State) -> events.Event:
        if self._enrolment is None:
            self.use(enrolled(self._config, self._device, self._link))
        keeps = bool(state.active_id) and self.slot.is_sound(state.active_id)
        if not keeps:
            self._uploads.clear()  # Made by a student, and for classes, that may be unknown to this cloud.
        return events.Enrolled(keeps, self._uploads.most_rounds())

    def _fetch(self, state: State, student_id: str) -> events.Event:
        if student_id and self.slot.is_sound(student_id):
            if state.purpose is not Purpose.BASE:
                self.slot.check_newest(student_id)
            return events.Fetched(student_id)
        return events.Fetched(self._download(student_id, f"student_{state.purpose.value}"))

    def _download(self, student_id: str, stage: str, *, again: bool = False) -> str:
        began_s = self._clock()
        tally = self._record.downloads.setdefault(stage, Tally())
        before_bytes = tally.came_bytes
        fetched_id = fetch_student(self._link, self.slot, student_id, self._observer.on_bytes, tally, again=again)
        self._on_transfer(tally.came_bytes - before_bytes, self._clock() - began_s)
        return fetched_id

    def _verify(self, state: State, student_id: str) -> events.Event:
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
        if state.purpose is Purpose.INTERIM:
            self._record.interim_ids.append(student_id)
        elif manifest.kind == "interim":
            reason = "the cloud offers an unfinished student as a finished one"
            self.slot.refuse(student_id, reason)
            raise InvalidInput(reason)
        return events.Verified(student_id)

    def _judge(self, state: State, old_id: str, new_id: str) -> events.Event:
        self.slot.started(new_id)
        if not self._config.guard:
            self.clips.check_runs(new_id)
            self.slot.finished(new_id)
            return events.Judged(new_id, True, "not compared with the student before: the guard is off")
        accept, reason = self.clips.compare(old_id, new_id, in_use=_in_use(state))
        self.slot.finished(new_id)
        if not accept:
            self.slot.refuse(new_id, reason)
        return events.Judged(new_id, accept, reason)

    def _swap(self, state: State, student_id: str) -> events.Event:
        if state.purpose is Purpose.FINAL:
            self.slot.started(student_id)
            # No guard may have run this student on the clips, or its run was cut short.
            self.clips.learn_user(student_id, in_use=_in_use(state))
            self.slot.finished(student_id)
        self.slot.activate(student_id)
        self.slot.prune(keep=(state.base_id, student_id))
        return events.Swapped(student_id)

    def _repair(self, student_id: str) -> events.Event:
        if not self.slot.is_sound(student_id):
            self._download(student_id, "student_repair", again=True)
        self.slot.verify(student_id)
        self.slot.activate(student_id)
        return events.Repaired(student_id)

    def _prototypes(self, state: State, student_id: str) -> Prototypes:
        if state.purpose is not Purpose.INTERIM:
            return self.clips.prototypes(student_id, in_use=_in_use(state))
        self.slot.started(student_id)
        prototypes = self.clips.prototypes(student_id, in_use=_in_use(state))
        self.slot.finished(student_id)
        return prototypes

    def _watch(self, job_id: str, on_job: Callable[[JobStatus], bool]) -> events.Event | None:
        for status in self._link.watch_job(job_id):
            self._record.job = status
            self._observer.on_job(status)
            if on_job(status):
                return None
        return events.WatchEnded(self._jitter())


def _in_use(state: State) -> tuple[str, ...]:
    return state.base_id, state.active_id
