"""One run of a device over a data set: personalise, answer the test clips in every way, and report.

While the cloud trains, or cannot be reached, the device answers the test clips with its first student ("before").
"""

from dataclasses import dataclass

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.inference import CloudAnswers, answer_locally
from isthmus.edge.agent.report import ClipResult, RunFacts, build_report
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.events import Answered
from isthmus.edge.behaviour.state import Phase, State
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.capture.sources import raw_bytes, replay
from isthmus.edge.link.compression import Setting, choose, make_policy
from isthmus.edge.own_clips.own_clips import StoredVerdict
from isthmus.edge.own_clips.personal import Personal, person_facts
from isthmus.edge.student.encoder import StudentEncoder, encode
from isthmus.proto.codec import frame_bytes
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import NumberType, ratio_name


@dataclass(frozen=True)
class InferConfig:
    """How test clips are answered. Empty ``ratios`` means all ratios of the student."""

    ratios: tuple[float, ...] = ()
    number_type: NumberType = NumberType.FP16
    latency_budget_s: float = 0.2


class DeviceRun:
    """Runs ``plan`` on the device of ``runtime``.

    >>> runtime = Runtime(RunConfig("kiosk"), DeviceState(folder), link, plan.selection)
    >>> run = DeviceRun(runtime, DeviceState(folder), plan, InferConfig(), cloud="in memory")
    >>> run.runtime.state.phase.name
    'ENROL'
    """

    def __init__(
        self, runtime: Runtime, device: DeviceState, plan: ClipPlan, config: InferConfig, *, cloud: str
    ) -> None:
        self.runtime = runtime
        self._device = device
        self._plan = plan
        self._config = config
        self._cloud = cloud
        self._results: dict[str, ClipResult] = {}
        self._before_done = False
        runtime.observer.on_accepted = self._answer_before
        self._on_wait = runtime.observer.on_wait
        runtime.observer.on_wait = self._answer_while_waiting

    def execute(self, *, patient: bool = False) -> dict[str, object]:
        """Personalise, answer, and return the report. ``patient``: see ``Runtime.run``.

        Raises Stopped if a person is needed, InvalidInput for a ratio that the student does not have.
        """
        began_s = self.runtime.clock()
        for damage in self._plan.damaged:
            self.runtime.damage(damage)
        state = self.runtime.run(patient=patient)
        self._relabel()
        if not self._before_done and state.base_id:
            self._answer_before()
        ratios = self._infer(state)
        return self._report(state, ratios, self.runtime.clock() - began_s)

    def _relabel(self) -> None:
        self._plan = self._plan.labelled(self.runtime.enrolment.classes)

    def _answer_while_waiting(self, seconds: float, reason: str) -> None:
        """Report the pause; a device that was restarted in mid-job uses it to answer by itself."""
        self._on_wait(seconds, reason)
        state = self.runtime.state
        if not self._before_done and state.base_id and state.phase is not Phase.ENROL:
            self._answer_before()

    def _answer_before(self) -> None:
        """Answer the test clips with the first student, without the link. Unusable clips are left out everywhere."""
        self._before_done = True
        self._relabel()
        runtime = self.runtime
        began_s = runtime.clock()
        runtime.observer.on_stage("infer_before")
        if not runtime.slot.is_sound(runtime.state.base_id):
            return  # Damage to a student that is not in use stops nothing.
        encoder = runtime.clips.encoder(runtime.state.base_id)
        reading = runtime.clips.reading_without_labels(runtime.state.base_id)
        for taken in replay(self._plan.test, runtime.spec, runtime.clock, runtime.damage):
            began_cpu_s = runtime.cpu_clock()
            encoded = encode(encoder, taken, runtime.spec, runtime.clock)
            runtime.note_answer(runtime.state.base_id, (runtime.cpu_clock() - began_cpu_s) * 1000)
            result = self._result(encoded.name, encoded.label)
            result.before = answer_locally(encoder, encoded.features, runtime.clock)
            result.before_without_labels = result.before.read(reading, encoded.features, cloud=False)
            runtime.observer.on_clip(len(self._results), len(self._plan.test))
        runtime.record.add("infer_before", runtime.clock() - began_s)

    def _infer(self, state: State) -> tuple[float, ...]:
        runtime = self.runtime
        runtime.observer.on_stage("infer")
        runtime.student_to_use()
        state = runtime.state
        manifest = runtime.slot.installed(state.active_id).manifest
        ratios = self._config.ratios or manifest.ratios
        unknown = [ratio_name(ratio) for ratio in ratios if ratio not in manifest.ratios]
        if unknown:
            offered = ", ".join(ratio_name(ratio) for ratio in manifest.ratios)
            raise InvalidInput(f"this student has no ratio {', '.join(unknown)}; it has {offered}")
        encoder = runtime.clips.encoder(state.active_id)
        reading = runtime.clips.reading(state.active_id)
        unsaid = runtime.clips.reading_without_labels(state.active_id)
        # Used only to report whether the refusal was right, on clips with a label.
        refused = None
        judged = self._compared(state) is not None  # else it was refused because it does not run
        if judged and state.refused_id and runtime.slot.is_sound(state.refused_id):
            refused = StudentEncoder(runtime.slot.installed(state.refused_id).folder)
        number_type = self._config.number_type
        settings = [Setting(r, number_type, frame_bytes(manifest.feature_width, r, number_type)) for r in ratios]
        answers = CloudAnswers(
            runtime.link, encoder, manifest, runtime.clock, runtime.link_failed, estimate=runtime.estimate
        )
        began_s = runtime.clock()
        try:
            for done, taken in enumerate(replay(self._plan.test, runtime.spec, runtime.clock, runtime.damage), 1):
                began_cpu_s = runtime.cpu_clock()
                encoded = encode(encoder, taken, runtime.spec, runtime.clock)
                runtime.note_answer(state.active_id, (runtime.cpu_clock() - began_cpu_s) * 1000)
                result = self._result(encoded.name, encoded.label)
                result.encoded = encoded
                result.plain = answer_locally(encoder, encoded.features, runtime.clock)
                result.without_labels = result.plain.read(unsaid, encoded.features, cloud=False)
                result.local = result.plain.read(reading, encoded.features, cloud=False)
                if refused is not None and encoded.label is not None:
                    of_refused = encode(refused, taken, runtime.spec, runtime.clock).features
                    result.refused = answer_locally(refused, of_refused, runtime.clock)
                for setting in settings:
                    result.cloud[setting.ratio] = answers.ask(encoded.features, setting).read(
                        reading, encoded.features, cloud=True
                    )
                    if result.cloud[setting.ratio].probabilities_C is not None:
                        runtime.note_link(Answered())
                runtime.observer.on_clip(done, len(self._plan.test))
        finally:
            answers.close()
        runtime.estimate = answers.estimate
        runtime.record.add("infer", runtime.clock() - began_s)
        return tuple(ratios)

    def _result(self, name: str, label: int | None) -> ClipResult:
        return self._results.setdefault(name, ClipResult(name, label))

    def _report(self, state: State, ratios: tuple[float, ...], wall_s: float) -> dict[str, object]:
        runtime, record = self.runtime, self.runtime.record
        traffic = runtime.link.traffic
        reading = runtime.clips.reading(state.active_id)
        facts = RunFacts(
            device_name=runtime.config.device_name,
            device_id=runtime.enrolment.device_id,
            cloud=self._cloud,
            seed=runtime.config.seed,
            number_type=self._config.number_type.value,
            ratios=ratios,
            classes=runtime.enrolment.classes,
            base_id=state.base_id,
            interim_ids=tuple(record.interim_ids),
            final_id=state.active_id if state.active_id != state.base_id else "",
            selection_names=tuple(ref.name for ref in self._plan.selection),
            damaged=record.damaged,
            uploads=tuple(self._device.ledger()),
            up_bytes=dict(traffic.up_bytes),
            down_bytes=dict(traffic.down_bytes),
            downloads=record.downloads,
            raw_selection_bytes=raw_bytes(self._plan.selection),
            raw_test_bytes=raw_bytes(self._plan.test),
            job=record.job,
            stage_s=record.stage_s,
            wall_s=wall_s,
            failure=state.failure,
            verdict=state.verdict,
            refused_id=state.refused_id,
            compared=self._compared(state),
            habits=None if isinstance(reading, Personal) else runtime.clips.habits(state.active_id),
            person=None if not isinstance(reading, Personal) else person_facts(reading, runtime.enrolment.classes),
            link=self._link_facts(ratios),
        )
        return build_report(facts, [self._results[name] for name in sorted(self._results)])

    def _compared(self, state: State) -> StoredVerdict | None:
        stored = self._device.verdict()
        return stored if stored is not None and stored.reason == state.verdict else None

    def _link_facts(self, ratios: tuple[float, ...]) -> dict[str, float | str | None]:
        estimate = self.runtime.estimate
        policy = make_policy(
            self.runtime.enrolment.feature_width, ratios, tuple(NumberType), self._config.latency_budget_s
        )
        chosen = choose(policy, estimate, None, link_up=estimate.round_trip_s is not None)
        return {
            "round_trip_s": estimate.round_trip_s,
            "throughput_bytes_s": estimate.throughput_bytes_s,
            "latency_budget_s": policy.latency_budget_s,
            "within_budget": "local" if chosen is None else f"ratio {chosen.ratio:g}, {chosen.number_type.value}",
        }
