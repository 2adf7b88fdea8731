"""The work of the commands of ``isthmus edge``."""

import contextlib
import itertools
import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import typer
from rich.console import Console

from isthmus.command_line import key_in, print_table
from isthmus.data.layouts.listing import read_listing
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.behaviour import Phase
from isthmus.edge.agent.device_run import DeviceRun, InferConfig
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.live import LiveAnswers, appearing_clips
from isthmus.edge.agent.report import write_report
from isthmus.edge.agent.runtime import RunConfig, Runtime
from isthmus.edge.capture.clip_plan import ClipPlan, plan_clips
from isthmus.edge.capture.sources import LiveCapture, raw_bytes, replay
from isthmus.edge.commands.options import ClipOptions, CloudOptions, RunOptions, UploadOptions
from isthmus.edge.commands.terminal import print_disclosure, print_result, terminal_observer
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.edge.own_clips.disclosure import disclose
from isthmus.edge.own_clips.selection_pass import PrototypeChoices, prototypes_of
from isthmus.edge.student.encoder import StudentEncoder, load_test
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import Enrolment, NumberType, UploadMode

errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)


def run(
    cloud: str,
    state: Path,
    clips: ClipOptions,
    upload: UploadOptions,
    known_as: CloudOptions,
    asked: RunOptions,
    ratios: tuple[float, ...],
) -> None:
    """Personalise and answer clips. Raises IsthmusError or ValueError; KeyboardInterrupt if it is interrupted."""
    budget_s = asked.latency_budget_ms / 1000
    infer = InferConfig(ratios, NumberType(asked.number_type), budget_s)
    with ending_on_sigterm():
        plan = _plan(clips)
        device = DeviceState(state)
        config = RunConfig(
            device_name=known_as.name[:64],
            enrolment_key=key_in(known_as.enrolment_key_file) or "",
            seed=clips.seed,
            rounds=asked.rounds,
            guard=asked.guard,
            habits=asked.habits,
            choices=_choices(upload),
        )
        link = GrpcLink(open_channel(cloud, tls=known_as.tls, tls_ca=known_as.tls_ca))
        with terminal_observer(errors) as observer:
            runtime = Runtime(config, device, link, plan.selection, observer=observer)
            with contextlib.closing(runtime):
                if asked.again:
                    runtime.personalise_again()
                result = DeviceRun(runtime, device, plan, infer, cloud=cloud).execute()
                if asked.report is not None:
                    write_report(asked.report, result)
                print_result(output, result)
                if not asked.once:
                    _keep_answering(runtime, clips, asked.camera, budget_s)
        if result["failure"]:
            raise IsthmusError(f"not personalised: {result['failure']}")


def prototypes(
    state: Path, clips: ClipOptions, upload: UploadOptions, known_as: CloudOptions, *, as_json: bool, cloud: str
) -> None:
    """Print what would leave the device. Raises IsthmusError or ValueError."""
    with ending_on_sigterm():
        plan = _plan(clips)
        device = DeviceState(state)
        if not device.agent().active_id:
            if not cloud:
                raise ValueError(f"{state} has no student yet: give --cloud HOST:PORT to fetch the base student")
            config = RunConfig(device_name=known_as.name[:64], enrolment_key=key_in(known_as.enrolment_key_file) or "")
            link = GrpcLink(open_channel(cloud, tls=known_as.tls, tls_ca=known_as.tls_ca))
            with (
                terminal_observer(errors) as observer,
                contextlib.closing(Runtime(config, device, link, (), observer=observer)) as runtime,
            ):
                runtime.run(until=Phase.ENCODE)
        slot, enrolment = _slot(device)
        student = slot.current()
        if student is None:
            raise ValueError(f"{state} has no student in use")
        with terminal_observer(errors) as observer:
            observer.on_stage("make_prototypes")
            made = prototypes_of(
                plan.selection,
                StudentEncoder(student.folder),
                InputSpec.from_json(enrolment.input_spec_json),
                _choices(upload),
                classes=len(enrolment.classes),
                seed=clips.seed,
                clock=time.monotonic,
                on_clip=observer.on_clip,
                on_damage=observer.on_damage,
            )
        disclosure = disclose(made, enrolment.classes, raw_bytes(plan.selection))
        if as_json:
            values = [[float(value) for value in row_C] for row_C in made.values_KC]
            features = None if made.features_KE is None else made.features_KE.tolist()
            sizes = made.sizes_K.tolist()
            typer.echo(json.dumps({**asdict(disclosure), "values": values, "sizes": sizes, "features": features}))
        else:
            print_disclosure(output, disclosure)


def status(state: Path, *, as_json: bool) -> None:
    """Print the device's state. Raises IsthmusError or ValueError."""
    device = _existing(state)
    enrolment, agent_state, ledger = device.enrolment(), device.agent(), device.ledger()
    facts = {
        "device_id": "" if enrolment is None else enrolment.device_id,
        "phase": agent_state.phase.value,
        "round": agent_state.round,
        "job_id": agent_state.job_id,
        "student": agent_state.active_id,
        "base_student": agent_state.base_id,
        "verdict": agent_state.verdict,
        "refused_student": agent_state.refused_id,
        "failure": agent_state.failure,
        "uploads": len(ledger),
        "uploaded_bytes": sum(entry.message_bytes for entry in ledger),
        "smallest_prototype": min((entry.smallest for entry in ledger), default=None),
        "epsilon_spent": sum(entry.epsilon or 0.0 for entry in ledger),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    print_table(
        ("what", "value"),
        [(key.replace("_", " "), "-" if value in ("", None) else str(value)) for key, value in facts.items()],
    )


def rollback(state: Path) -> None:
    """Go back to the previous student. Raises IsthmusError or ValueError."""
    device = _existing(state)
    slot, _ = _slot(device)
    installed = slot.rollback()
    device.save_agent(replace(device.agent(), active_id=installed.manifest.student_id))
    typer.echo(f"now using student {installed.manifest.student_id} ({installed.manifest.kind})")


def _plan(clips: ClipOptions) -> ClipPlan:
    return plan_clips(
        clips.data,
        layout=clips.layout,
        actors=clips.actor,
        clips=clips.clips,
        selection_clips=clips.selection_clips,
        test_clips=clips.test_clips,
        seed=clips.seed,
    )


def _choices(upload: UploadOptions) -> PrototypeChoices:
    return PrototypeChoices(upload.min_cluster, upload.clips_per_cluster, UploadMode(upload.mode), upload.noise)


def _keep_answering(runtime: Runtime, clips: ClipOptions, camera: int | None, budget_s: float) -> None:
    """Answer new clips of the folder, or of the camera, until the process is interrupted."""
    answers = LiveAnswers(runtime, budget_s)
    classes = runtime.enrolment.classes
    with contextlib.closing(answers), contextlib.ExitStack() as stack:
        if camera is None:
            seen = {ref.name for ref in read_listing(clips.data, clips.layout).refs}
            typer.echo(f"answering new clips in {clips.data}; press Ctrl-C to end", err=True)
            appearing = appearing_clips(clips.data, clips.layout, seen, time.sleep)
            taken = replay(appearing, runtime.spec, runtime.clock, runtime.damage)
        else:
            live = stack.enter_context(LiveCapture(runtime.spec, runtime.clock, camera=camera))
            typer.echo(f"answering camera {camera}; press Ctrl-C to end", err=True)
            taken = (live.record(f"live-{number}") for number in itertools.count(1))
        for each in taken:
            result = answers.answer(each, random.random())
            where = "on the device" if result.setting is None else f"through the cloud, ratio {result.setting.ratio:g}"
            guess = result.answer.predicted
            typer.echo(f"{result.name}: {'?' if guess is None else classes[guess]} ({where})")


def _existing(state: Path) -> DeviceState:
    if not state.is_dir():
        raise ValueError(f"{state} is no folder of a device: 'isthmus edge run --state {state} ...' makes one")
    return DeviceState(state)


def _slot(device: DeviceState) -> tuple[StudentSlot, Enrolment]:
    enrolment = device.enrolment()
    if enrolment is None:
        raise ValueError(f"{device.root}: this device has not enrolled yet, so it has no student")
    return StudentSlot(device.root / "students", enrolment.signing_public_key, load_test), enrolment


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, as a service manager sends it, end the device like Ctrl-C. Everything that matters is on disk."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
