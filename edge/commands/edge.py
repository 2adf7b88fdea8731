"""``isthmus edge``: run the device, see what would leave it, see where it stands, go back to the student before."""

import contextlib
import itertools
import json
import platform
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from isthmus.data.layouts.listing import read_listing
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.behaviour import Phase
from isthmus.edge.agent.device_run import DeviceRun, InferConfig
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.live import LiveAnswers, appearing_clips
from isthmus.edge.agent.report import write_report
from isthmus.edge.agent.runtime import RunConfig, Runtime
from isthmus.edge.capture.clip_plan import plan_clips
from isthmus.edge.capture.sources import LiveCapture, raw_bytes, replay
from isthmus.edge.commands.terminal import print_disclosure, print_result, terminal_observer
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.edge.own_clips.disclosure import disclose
from isthmus.edge.own_clips.selection_pass import PrototypeChoices, prototypes_of
from isthmus.edge.student.encoder import StudentEncoder, load_test
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import Enrolment, NumberType, UploadMode

THIS_MACHINE = platform.node() or "device"

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="The device: run the agent, see what would leave it."
)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)

StateOption = Annotated[Path, typer.Option("--state", help="Folder of this device: identity, students, outbox.")]
DataOption = Annotated[
    Path, typer.Option("--data", help="Clips in the CREMA-D or AVE layout.", exists=True, file_okay=False)
]
LayoutOption = Annotated[str, typer.Option("--layout", help="auto, crema-d or ave.")]
ActorOption = Annotated[list[str], typer.Option("--actor", help="Only this actor's clips. May be repeated.")]
ClipsOption = Annotated[Path | None, typer.Option("--clips", help="Only the clips named in this file, one a line.")]
SelectionOption = Annotated[
    Path | None, typer.Option("--selection-clips", help="Names of the clips that prototypes are made of.")
]
TestOption = Annotated[Path | None, typer.Option("--test-clips", help="Names of the clips that are then answered.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the halves, of k-means, and of the cloud's job.")]
FloorOption = Annotated[int, typer.Option("--min-cluster", min=1, help="No prototype stands for fewer clips.")]
PerClusterOption = Annotated[
    int, typer.Option("--clips-per-cluster", min=1, help="k-means makes n over this clusters.")
]
NoiseOption = Annotated[
    float | None, typer.Option("--noise", help="Add Laplace noise worth this epsilon to every upload.")
]
ModeOption = Annotated[
    UploadMode,
    typer.Option(
        "--mode",
        help="prototypes (averages), probabilities (each clip's own: less private), or features (averages of features "
        "too: tells most of a clip, lets the cloud choose best).",
    ),
]
TlsOption = Annotated[bool, typer.Option("--tls", help="Use TLS with the system's authorities.")]
TlsCaOption = Annotated[Path | None, typer.Option("--tls-ca", help="Use TLS with the authorities in this PEM file.")]
KeyFileOption = Annotated[
    Path | None, typer.Option("--enrolment-key-file", help="File with the cloud's enrolment key, where it wants one.")
]
NameOption = Annotated[str, typer.Option("--name", help="How the cloud's operator sees this device.")]


@app.command()
def run(
    cloud: Annotated[str, typer.Option("--cloud", help="The cloud's address, HOST:PORT.")],
    state: StateOption,
    data: DataOption,
    layout: LayoutOption = "auto",
    actor: ActorOption = [],  # noqa: B006 (typer copies it)
    clips: ClipsOption = None,
    selection_clips: SelectionOption = None,
    test_clips: TestOption = None,
    ratios: Annotated[
        str, typer.Option("--ratios", help="Compression ratios to answer at, such as 1,2. All if empty.")
    ] = "",
    number_type: Annotated[
        NumberType, typer.Option("--number-type", help="How feature values travel.")
    ] = NumberType.FP16,
    report: Annotated[Path | None, typer.Option("--report", help="Write what was seen to this JSON file.")] = None,
    seed: SeedOption = 0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, max=100, help="Rounds of selection; 0: the cloud's recipe.")
    ] = 0,
    min_cluster: FloorOption = 3,
    clips_per_cluster: PerClusterOption = 3,
    mode: ModeOption = UploadMode.PROTOTYPES,
    noise: NoiseOption = None,
    latency_budget_ms: Annotated[
        float, typer.Option("--latency-budget-ms", min=1, help="Within which a live clip is to be answered.")
    ] = 200.0,
    once: Annotated[bool, typer.Option("--once", help="End after the clips that are there now.")] = False,
    camera: Annotated[
        int | None, typer.Option("--camera", help="Afterwards answer this camera and the microphone, not new files.")
    ] = None,
    guard: Annotated[
        bool,
        typer.Option(
            "--guard/--no-guard",
            help="Compare a new student with the present one on the selection clips, without labels, and refuse it "
            "where it would not pay. Without the guard a worse student is taken like a better one.",
        ),
    ] = True,
    habits: Annotated[
        bool,
        typer.Option(
            "--habits/--no-habits",
            help="Estimate on this device alone, from unlabelled selection clips, how often you are in each "
            "state, and answer accordingly.",
        ),
    ] = True,
    again: Annotated[bool, typer.Option("--again", help="Personalise anew, from the present student.")] = False,
    name: NameOption = THIS_MACHINE,
    enrolment_key_file: KeyFileOption = None,
    tls: TlsOption = False,
    tls_ca: TlsCaOption = None,
) -> None:
    """Personalise this device's student and answer clips with it.

    Enrols, fetches the base student, sends prototypes of the selection clips, follows the cloud's work, fetches and
    verifies the finished student, swaps it in if it pays, and answers the test clips: through the cloud at each ratio,
    and alone. A run that was interrupted goes on where it was. Without --once the device then keeps answering clips
    that come into the data folder (or the camera's), until it is interrupted.
    """
    infer = InferConfig(_ratios(ratios), number_type, latency_budget_ms / 1000)
    with clear_errors(), ending_on_sigterm():
        plan = plan_clips(
            data,
            layout=layout,
            actors=actor,
            clips=clips,
            selection_clips=selection_clips,
            test_clips=test_clips,
            seed=seed,
        )
        device = DeviceState(state)
        config = RunConfig(
            device_name=name[:64],
            enrolment_key=_key(enrolment_key_file),
            seed=seed,
            rounds=rounds,
            guard=guard,
            habits=habits,
            choices=PrototypeChoices(min_cluster, clips_per_cluster, mode, noise),
        )
        link = GrpcLink(open_channel(cloud, tls=tls, tls_ca=tls_ca))
        with terminal_observer(errors) as observer:
            runtime = Runtime(config, device, link, plan.selection, observer=observer)
            with contextlib.closing(runtime):
                if again:
                    runtime.personalise_again()
                result = DeviceRun(runtime, device, plan, infer, cloud=cloud).execute()
                if report is not None:
                    write_report(report, result)
                print_result(output, result)
                if not once:
                    _keep_answering(runtime, data, layout, camera, latency_budget_ms / 1000)
        if result["failure"]:
            raise IsthmusError(f"not personalised: {result['failure']}")


@app.command()
def prototypes(
    state: StateOption,
    data: DataOption,
    layout: LayoutOption = "auto",
    actor: ActorOption = [],  # noqa: B006 (typer copies it)
    clips: ClipsOption = None,
    selection_clips: SelectionOption = None,
    test_clips: TestOption = None,
    seed: SeedOption = 0,
    min_cluster: FloorOption = 3,
    clips_per_cluster: PerClusterOption = 3,
    mode: ModeOption = UploadMode.PROTOTYPES,
    noise: NoiseOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the very numbers, for a program.")] = False,
    cloud: Annotated[
        str, typer.Option("--cloud", help="Needed only by a device without a student: fetches the base student first.")
    ] = "",
    name: NameOption = THIS_MACHINE,
    enrolment_key_file: KeyFileOption = None,
    tls: TlsOption = False,
    tls_ca: TlsCaOption = None,
) -> None:
    """Show exactly what would leave this device, in bytes and in plain words. Nothing of your clips is sent."""
    with clear_errors(), ending_on_sigterm():
        plan = plan_clips(
            data,
            layout=layout,
            actors=actor,
            clips=clips,
            selection_clips=selection_clips,
            test_clips=test_clips,
            seed=seed,
        )
        device = DeviceState(state)
        if not device.agent().active_id:
            if not cloud:
                raise ValueError(f"{state} has no student yet: give --cloud HOST:PORT to fetch the base student")
            config = RunConfig(device_name=name[:64], enrolment_key=_key(enrolment_key_file))
            link = GrpcLink(open_channel(cloud, tls=tls, tls_ca=tls_ca))
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
                PrototypeChoices(min_cluster, clips_per_cluster, mode, noise),
                classes=len(enrolment.classes),
                seed=seed,
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


@app.command()
def status(
    state: StateOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where this device stands: identity, phase, students, and all it has ever sent of its user."""
    with clear_errors():
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
        table = Table("what", "value", show_header=False, box=None)
        for key, value in facts.items():
            table.add_row(key.replace("_", " "), "-" if value in ("", None) else str(value))
        output.print(table)


@app.command()
def rollback(state: StateOption) -> None:
    """Go back to the student that was in use before; again, and it is forward."""
    with clear_errors():
        device = _existing(state)
        slot, _ = _slot(device)
        installed = slot.rollback()
        device.save_agent(replace(device.agent(), active_id=installed.manifest.student_id))
        output.print(f"now using student {installed.manifest.student_id} ({installed.manifest.kind})")


def _keep_answering(runtime: Runtime, data: Path, layout: str, camera: int | None, budget_s: float) -> None:
    answers = LiveAnswers(runtime, budget_s)
    classes = runtime.enrolment.classes
    with contextlib.closing(answers), contextlib.ExitStack() as stack:
        if camera is None:
            seen = {ref.name for ref in read_listing(data, layout).refs}
            errors.print(f"answering clips that come into {data}; interrupt to end")
            taken = replay(appearing_clips(data, layout, seen, time.sleep), runtime.spec, runtime.clock, runtime.damage)
        else:
            live = stack.enter_context(LiveCapture(runtime.spec, runtime.clock, camera=camera))
            errors.print(f"answering camera {camera}; interrupt to end")
            taken = (live.record(f"live-{number}") for number in itertools.count(1))
        for each in taken:
            result = answers.answer(each, random.random())
            where = "on the device" if result.setting is None else f"through the cloud, ratio {result.setting.ratio:g}"
            guess = result.answer.predicted
            output.print(f"{result.name}: {'?' if guess is None else classes[guess]} ({where})")


def _existing(state: Path) -> DeviceState:
    if not state.is_dir():
        raise ValueError(f"{state} is no folder: 'isthmus edge run --state {state} ...' makes it")
    return DeviceState(state)


def _slot(device: DeviceState) -> tuple[StudentSlot, Enrolment]:
    enrolment = device.enrolment()
    if enrolment is None:
        raise ValueError(f"{device.root}: this device has not enrolled yet, so it has no student")
    return StudentSlot(device.root / "students", enrolment.signing_public_key, load_test), enrolment


def _key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the enrolment key cannot be read") from error


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"--ratios {text!r}: wanted numbers with commas between, such as 1,2") from error
    if len(set(ratios)) != len(ratios):
        raise typer.BadParameter(f"--ratios {text!r}: one is there twice")
    return ratios


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What a person can mend becomes one line and exit code 1; an interruption, 130."""
    try:
        yield
    except (IsthmusError, ValueError) as error:
        errors.print(f"isthmus edge: {error}", markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interruption:
        errors.print("isthmus edge: interrupted; the same command goes on from here")
        raise typer.Exit(130) from interruption


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """A service manager's SIGTERM ends the device as an interruption does: all that matters is on disk already."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
