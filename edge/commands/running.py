"""The work of the commands of ``isthmus edge``."""

import contextlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from isthmus.command_line import key_in, print_table
from isthmus.data.clip import ClipRef
from isthmus.data.layouts.listing import read_listing
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_run import DeviceRun, InferConfig
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.enrolling import enrol_anew
from isthmus.edge.agent.life import Life, followed, frames_of
from isthmus.edge.agent.live import LiveAnswers, Worker, appearing_clips, working
from isthmus.edge.agent.release_watch import ReleaseWatch
from isthmus.edge.agent.report import write_report
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.agent.service_manager import ServiceManager
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan, plan_clips
from isthmus.edge.capture.process import Capture
from isthmus.edge.capture.sources import raw_bytes, replay
from isthmus.edge.commands.living import keep_living, store_of
from isthmus.edge.commands.options import ClipOptions, CloudOptions, RunOptions, UploadOptions
from isthmus.edge.commands.replying import note_answer, note_newest, take_consent
from isthmus.edge.commands.terminal import plain, print_disclosure, print_result, terminal_observer
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.edge.link.sent import SentMessages
from isthmus.edge.own_clips.disclosure import disclose
from isthmus.edge.own_clips.selection_pass import PrototypeChoices, prototypes_of
from isthmus.edge.own_clips.store import StoredSelection, people_in, person_folder
from isthmus.edge.requests.device import SENT, Device
from isthmus.edge.requests.facts import privacy
from isthmus.edge.requests.requests import answered, ask
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.edge.student.slot import StudentSlot
from isthmus.edge.student.trial import try_student
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import Enrolment, NumberType, UploadMode

errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)

UNKNOWN = "nothing of a person unknown is kept; --person NAME says who is there"


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
    _check_choices(clips, asked)
    with ending_on_sigterm(), contextlib.ExitStack() as stack:
        plan = None if clips.data is None else _plan(clips, clips.data)
        others = people_in(state) if plan is None and not asked.person else ()
        device = DeviceState(person_folder(state, asked.person) if asked.person else state)
        stack.enter_context(device.held())
        store = store_of(device)
        selection: Sequence[ClipRef] = StoredSelection(store) if plan is None else plan.selection
        take_consent(device, allowed=asked.share_state)
        config = RunConfig(
            device_name=known_as.name[:64],
            enrolment_key=key_in(known_as.enrolment_key_file) or "",
            seed=clips.seed,
            rounds=asked.rounds,
            guard=asked.guard,
            habits=asked.habits and not others,
            epsilon_budget=upload.epsilon_budget,
            choices=_choices(upload),
            ask_cloud=asked.ask_cloud,
        )
        life = Life(stack.enter_context(contextlib.closing(SentMessages(device.root / SENT))))
        life.learns = not others
        life.service = ServiceManager(os.environ, time.monotonic)
        stack.callback(life.service.stopping)
        observer = followed(stack.enter_context(terminal_observer(errors)), life.happenings)
        link = _link(cloud, known_as)
        link.traffic.on_sent = life.sent.note
        runtime = Runtime(config, device, link, selection, observer=observer)
        life.sent.frames = frames_of(runtime)
        stack.enter_context(contextlib.closing(runtime))
        if others:
            errors.print(plain(f"shared by {', '.join(others)}: {UNKNOWN}"), markup=False)
        if asked.again and not life.learns:
            errors.print("--again: nobody is named, so the student in use stays", markup=False)
        elif asked.again and plan is None and not runtime.affordable:
            errors.print("--again: the privacy budget is spent, so the student in use stays", markup=False)
        elif asked.again:
            runtime.personalise_again()
        try:
            stack.enter_context(answered(Device(device, runtime, life)))
        except OSError as error:
            errors.print(plain(f"other commands cannot talk to this device while it runs: {error}"), markup=False)
        if plan is None:
            keep_living(runtime, device, store, asked, budget_s, life)
            return
        device_run = DeviceRun(runtime, device, plan, infer, cloud=cloud)

        def personalise(patient: bool) -> dict[str, object]:
            result = device_run.execute(patient=patient)
            if asked.report is not None:
                write_report(asked.report, result)
            print_result(output, result)
            note_newest(device, result)
            return result

        if asked.once:
            result = personalise(patient=False)
            if result["failure"]:
                raise IsthmusError(f"not personalised: {result['failure']}; the same command tries again")
        else:
            worker = stack.enter_context(working(runtime))
            worker.start(lambda: personalise(patient=True))
            _keep_answering(runtime, device, worker, clips, asked, budget_s, life)


def prototypes(
    state: Path, clips: ClipOptions, upload: UploadOptions, known_as: CloudOptions, *, as_json: bool, cloud: str
) -> None:
    """Print what would leave the device. Raises IsthmusError or ValueError."""
    with ending_on_sigterm():
        device = DeviceState(state)
        selection: Sequence[ClipRef]
        selection = StoredSelection(store_of(device)) if clips.data is None else _plan(clips, clips.data).selection
        if not device.agent().active_id:
            if not cloud:
                raise ValueError(f"{state} has no student yet: give --cloud HOST:PORT to fetch the base student")
            config = RunConfig(
                device_name=known_as.name[:64],
                enrolment_key=key_in(known_as.enrolment_key_file) or "",
                epsilon_budget=upload.epsilon_budget,
                choices=_choices(upload),
            )
            with (
                device.held(),
                terminal_observer(errors) as observer,
                contextlib.closing(Runtime(config, device, _link(cloud, known_as), (), observer=observer)) as runtime,
            ):
                runtime.run(until=Phase.ENCODE)
        slot, enrolment = _slot(device)
        student = slot.current()
        if student is None or not slot.is_sound(student.manifest.student_id):
            raise ValueError(f"{state} has no sound student in use; 'isthmus edge run' fetches it again")
        with terminal_observer(errors) as observer:
            observer.on_stage("make_prototypes")
            made = prototypes_of(
                selection,
                StudentEncoder(student.folder),
                InputSpec.from_json(enrolment.input_spec_json),
                _choices(upload),
                classes=len(enrolment.classes),
                seed=clips.seed,
                clock=time.monotonic,
                on_clip=observer.on_clip,
                on_damage=observer.on_damage,
            )
        disclosure = disclose(made, enrolment.classes, raw_bytes(selection))
        spent = privacy(device)
        if as_json:
            values = [[float(value) for value in row_C] for row_C in made.values_KC]
            features = None if made.features_KE is None else made.features_KE.tolist()
            sizes = made.sizes_K.tolist()
            numbers = {"values": values, "sizes": sizes, "features": features}
            typer.echo(json.dumps({**asdict(disclosure), **numbers, **spent}))
        else:
            print_disclosure(output, disclosure)
            typer.echo(_privacy_sentence(spent))


def status(state: Path, *, as_json: bool) -> None:
    """Print the device's state. Raises IsthmusError or ValueError."""
    facts = ask(_existing(state), "status")
    if as_json:
        typer.echo(json.dumps(facts))
        return
    print_table(
        ("what", "value"),
        [(key.replace("_", " "), "-" if value in ("", None) else plain(str(value))) for key, value in facts.items()],
    )


def rollback(state: Path) -> None:
    """Go back to the previous student. Raises IsthmusError or ValueError."""
    now = ask(_existing(state), "rollback")
    typer.echo(plain(f"now using student {now['student']} ({now['kind']})"))


def correct(state: Path, clip: str, label: str, *, undo: bool) -> None:
    """Add a correction, or take back the newest one. Raises IsthmusError or ValueError."""
    device = _existing(state)
    if undo:
        gone = ask(device, "undo_correction")
        typer.echo(plain(f"taken back: {gone['clip']} was {gone['label']}; {gone['corrections']} corrections remain"))
    else:
        made = ask(device, "correct", clip=clip, label=label)
        typer.echo(plain(f"learned: {made['clip']} was {made['label']}; {made['corrections']} corrections count"))


def question(state: Path, a_day: int | None, *, as_json: bool) -> None:
    """Print the clip to ask about. Raises IsthmusError or ValueError."""
    asked = ask(_existing(state), "question", a_day=-1 if a_day is None else a_day)
    if as_json:
        typer.echo(json.dumps(asked))
        return
    guesses = ", ".join(f"{name} {share:.0%}" for name, share in asked["guesses"].items())
    typer.echo(plain(f"What was {asked['clip']}? This device thinks: {guesses}."))
    typer.echo(plain(f"Answer with: isthmus edge correct {asked['clip']} LABEL --state {state}"))


def enrol(cloud: str, state: Path, known_as: CloudOptions, *, again: bool) -> None:
    """Give the device an identity. Raises IsthmusError or ValueError."""
    device = DeviceState(state)
    with ending_on_sigterm(), device.held():
        if device.enrolment_readable() and not again:
            raise ValueError(f"{state} has enrolled already; give --again to enrol again")
        config = RunConfig(device_name=known_as.name[:64], enrolment_key=key_in(known_as.enrolment_key_file) or "")
        with contextlib.closing(_link(cloud, known_as)) as link:
            typer.echo(f"enrolled as {enrol_anew(config, device, link)}")


def _link(cloud: str, known_as: CloudOptions) -> GrpcLink:
    own = known_as.own_certificate

    def connect() -> Any:
        # The files are read at each connection, so a renewed certificate is used from the next one on.
        return open_channel(cloud, tls=known_as.tls, tls_ca=known_as.tls_ca, own=own)

    return GrpcLink(connect(), connect)


def _check_choices(clips: ClipOptions, asked: RunOptions) -> None:
    """Raise ValueError for a choice that a run of this kind would not heed."""
    if clips.data is not None:
        if not asked.ask_cloud:
            raise ValueError("--no-ask-cloud is for live clips: a run over --data compares both answers")
        return
    of_data = {
        "--once": asked.once,
        "--report": asked.report,
        "--ratios": asked.ratios,
        "--actor": clips.actor,
        "--clips": clips.clips,
        "--selection-clips": clips.selection_clips,
        "--test-clips": clips.test_clips,
    }
    for flag, given in of_data.items():
        if given:
            raise ValueError(f"{flag} needs --data: it is for a run over a data set, and not for live clips")


def _privacy_sentence(spent: dict[str, float | int | None]) -> str:
    budget, rounds = spent["epsilon_budget"], spent["rounds_allowed"]
    limit = "no budget is set" if budget is None else f"the budget is {budget:g}"
    uploads = "1 upload" if rounds == 1 else f"{rounds} uploads"
    pinned = "" if rounds is None else f" Without --rounds, a personalisation makes at most {uploads}."
    return f"This device has spent epsilon {spent['epsilon_spent']:g}; {limit}.{pinned}"


def _plan(clips: ClipOptions, data: Path) -> ClipPlan:
    return plan_clips(
        data,
        layout=clips.layout,
        actors=clips.actor,
        clips=clips.clips,
        selection_clips=clips.selection_clips,
        test_clips=clips.test_clips,
        seed=clips.seed,
    )


def _choices(upload: UploadOptions) -> PrototypeChoices:
    return PrototypeChoices(upload.min_cluster, upload.clips_per_cluster, UploadMode(upload.mode), upload.noise)


def _keep_answering(
    runtime: Runtime,
    device: DeviceState,
    worker: Worker,
    clips: ClipOptions,
    asked: RunOptions,
    budget_s: float,
    life: Life,
) -> None:
    """Answer new clips of the folder, or of the camera, until the process is interrupted. ``worker`` personalises."""

    def pause(seconds: float) -> None:
        worker.check()
        life.service.alive()
        time.sleep(seconds)

    answers = LiveAnswers(runtime, worker, budget_s, pause)
    life.link = answers.memory
    data = clips.data
    assert data is not None
    seen = {ref.name for ref in read_listing(data, clips.layout).refs}
    watch = ReleaseWatch(runtime, random.random)
    life.service.ready()
    while not runtime.state.active_id:
        pause(0.5)
    classes = runtime.enrolment.classes
    with contextlib.closing(answers), contextlib.ExitStack() as stack:
        if asked.camera is None:
            typer.echo(f"answering new clips in {data}; press Ctrl-C to end", err=True)
            appearing = appearing_clips(data, clips.layout, seen, pause)
            taken = replay(appearing, runtime.spec, runtime.clock, runtime.damage)
        else:
            say = partial(typer.echo, err=True)
            live = stack.enter_context(
                Capture(
                    runtime.spec,
                    runtime.clock,
                    lambda text: say(plain(text)),
                    camera=asked.camera,
                    microphone=asked.microphone,
                    gated=asked.gate,
                    framing=asked.framing,
                    wait=pause,
                )
            )
            say(f"answering camera {asked.camera}; press Ctrl-C to end")
            captured = (live.next_clip(f"live-{number}").taken for number in itertools.count(1))
            taken = (each for each in captured if each is not None)
        for each in taken:
            if asked.follow_releases:
                watch.look(worker)
            began_s, ended_s, asked_before = runtime.clock(), time.time(), answers.memory.asked
            result = answers.answer(each, random.random())
            life.answered(
                result,
                classes,
                ended_s=ended_s,
                took_ms=(runtime.clock() - began_s) * 1000,
                sound=each.clip.spectrogram_FT is not None,
                picture=each.clip.frames_KHWC is not None,
                asked=answers.memory.asked > asked_before,
            )
            where = "on the device" if result.setting is None else f"through the cloud, ratio {result.setting.ratio:g}"
            guess = result.answer.predicted
            note_answer(device, classes, result.answer)
            typer.echo(plain(f"{result.name}: {'?' if guess is None else classes[guess]} ({where})"))


def _existing(state: Path) -> DeviceState:
    if not state.is_dir():
        raise ValueError(f"{state} is no folder of a device: 'isthmus edge run --state {state} ...' makes one")
    return DeviceState(state)


def _slot(device: DeviceState) -> tuple[StudentSlot, Enrolment]:
    enrolment = device.enrolment()
    if enrolment is None:
        raise ValueError(f"{device.root}: this device has not enrolled yet, so it has no student")
    slot = StudentSlot(
        device.root / "students", enrolment.signing_public_key, try_student, device_id=enrolment.device_id
    )
    return slot, enrolment


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
