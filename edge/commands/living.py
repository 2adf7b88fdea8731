"""The work of ``isthmus edge run`` without a data set: capture, answer, store, and personalise from what is stored."""

import contextlib
import random
import time
from pathlib import Path

import typer

from isthmus.command_line import print_table
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.life import Life
from isthmus.edge.agent.live import LiveAnswers, Worker, working
from isthmus.edge.agent.release_watch import ReleaseWatch
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.own_life import Clips, Task, due
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.process import Capture, Captured
from isthmus.edge.commands.options import RunOptions
from isthmus.edge.commands.replying import note_answer
from isthmus.edge.commands.terminal import plain
from isthmus.edge.own_clips.store import ClipStore, person_folder
from isthmus.edge.requests.requests import ask
from isthmus.edge.requests.student import FEWEST_CLIPS
from isthmus.edge.watched.view import LiveView
from isthmus.proto.errors import IsthmusError, StorageFull

PAUSED_LOOK_S = 1.0


def store_of(device: DeviceState) -> ClipStore:
    """Return the clips of a device."""
    return ClipStore(device.root / "clips")


def keep_living(
    runtime: Runtime, device: DeviceState, store: ClipStore, asked: RunOptions, budget_s: float, life: Life
) -> None:
    """Capture and answer until the process is interrupted. A worker thread personalises meanwhile.

    ``life`` learns what happens.
    """
    store.tidy()
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(working(runtime))

        def pause(seconds: float) -> None:
            worker.check()
            life.service.alive()
            time.sleep(seconds)

        answers = stack.enter_context(contextlib.closing(LiveAnswers(runtime, worker, budget_s, pause)))
        life.link, life.working = answers.memory, lambda: worker.busy
        _work(runtime, device, store, worker, asked.clips_before, life)
        watch = ReleaseWatch(
            runtime, random.random, may_personalise=lambda: life.learns and len(store.clips()) >= asked.clips_before
        )
        say = _Sayer(life)
        life.service.ready()
        if not runtime.state.active_id:
            life.service.status("waiting for the cloud's base student")
        while not runtime.state.active_id:
            pause(0.5)
        while True:
            while store.paused:
                say.once("paused: nothing is captured; 'isthmus edge clips resume' goes on")
                pause(PAUSED_LOOK_S)
                _work(runtime, device, store, worker, asked.clips_before, life)
            with Capture(
                runtime.spec,
                runtime.clock,
                say.now,
                camera="0" if asked.camera is None else asked.camera,
                microphone=asked.microphone,
                gated=asked.gate,
                framing=asked.framing,
                wait=pause,
            ) as capture:
                say.once("capturing; press Ctrl-C to end")
                life.view = LiveView(capture, runtime.spec, runtime.clock)
                try:
                    while not store.paused:
                        ends_s = time.time() + runtime.spec.duration_s
                        name = store.free_name()
                        captured = capture.next_clip(name)
                        if not store.paused:  # else it was captured after the person had paused
                            _tell(name, captured, ends_s, runtime, device, answers, store, say, life)
                        _work(runtime, device, store, worker, asked.clips_before, life)
                        if asked.follow_releases:
                            watch.look(worker)
                finally:
                    life.view = None


def show_clips(state: Path, person: str) -> None:
    """Print the stored clips. Raises IsthmusError or ValueError."""
    store = _existing_store(state, person)
    clips = store.clips()
    rows = [
        (
            clip.name,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(clip.captured_s)),
            " and ".join(word for word, has in (("sound", clip.sound), ("picture", clip.picture)) if has),
            f"{clip.size_bytes / 1024:.0f} KiB",
            "yes" if clip.kept else "",
        )
        for clip in clips
    ]
    print_table(("clip", "captured", "has", "size", "kept"), rows)
    state_words = "Capture is paused." if store.paused else "Capture is not paused."
    typer.echo(f"{len(clips)} clips in {store.folder}; any player shows them. {state_words}")


def delete_clips(state: Path, person: str, names: list[str], *, everything: bool) -> None:
    """Delete clips. Raises IsthmusError or ValueError."""
    if bool(names) == everything:
        raise ValueError("name the clips to delete, or give --all")
    store = _existing_store(state, person)
    device = DeviceState(store.folder.parent)
    count = ask(device, "delete_clips", names=names, everything=everything)["deleted"]
    agent = device.agent()
    own = "; the student that was made of them stays, 'isthmus edge rollback' leaves it"
    typer.echo(
        f"deleted {count} clip{'s' * (count != 1)}, and what was learned of them without the cloud"
        + own * (agent.active_id != agent.base_id)
    )


def change_clips(state: Path, person: str, change: str, names: list[str]) -> None:
    """Keep clips, pause or resume. Raises IsthmusError or ValueError."""
    store = _existing_store(state, person)
    if change == "keep":
        for name in names:
            store.keep(name)
        typer.echo(f"kept beyond their time: {', '.join(names)}")
    elif change == "pause":
        store.pause()
        typer.echo("capture is paused; a running device stops within one clip")
    else:
        store.resume()
        typer.echo("capture goes on")


class _Sayer:
    """Prints on stderr, notes it, and reports it as the service's status; ``once`` leaves out the same text again."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._last = ""

    def now(self, text: str) -> None:
        self._last = text
        self._life.happenings.note("trouble", text=text.partition("; press Ctrl-C")[0])
        self._life.service.status(plain(text))
        typer.echo(plain(text), err=True)

    def once(self, text: str) -> None:
        if text != self._last:
            self.now(text)


def _tell(
    name: str,
    captured: Captured,
    ended_s: float,
    runtime: Runtime,
    device: DeviceState,
    answers: LiveAnswers,
    store: ClipStore,
    say: _Sayer,
    life: Life,
) -> None:
    if captured.taken is None:
        say.once(captured.reason)
        life.happenings.note("withheld", reason=captured.reason, ended_s=ended_s)
        return
    began_s, asked_before = runtime.clock(), answers.memory.asked
    result = answers.answer(captured.taken, random.random())
    life.answered(
        result,
        runtime.enrolment.classes,
        ended_s=ended_s,
        took_ms=(runtime.clock() - began_s) * 1000,
        sound=captured.waveform_T is not None,
        picture=captured.pictures is not None,
        asked=answers.memory.asked > asked_before,
    )
    where = "on the device" if result.setting is None else f"through the cloud, ratio {result.setting.ratio:g}"
    guess = result.answer.predicted
    classes = runtime.enrolment.classes
    note_answer(device, classes, result.answer)
    typer.echo(plain(f"{result.name}: {'?' if guess is None else classes[guess]} ({where})"))
    if not life.learns:
        return
    try:
        store.add(captured.waveform_T, captured.pictures, runtime.spec, name)
    except StorageFull as error:
        say.once(f"this clip is answered, not stored: {error}")


def _work(runtime: Runtime, device: DeviceState, store: ClipStore, worker: Worker, wanted: int, life: Life) -> None:
    """Give the worker what is due, or what the person asked for."""
    worker.check()
    if worker.busy:
        return
    if life.personalise.is_set():
        life.personalise.clear()
        wanted = FEWEST_CLIPS
        if runtime.state.phase is Phase.SERVE:
            runtime.personalise_again()
    ledger = device.ledger()
    last_s = max((entry.sent_s for entry in ledger), default=None)
    clips = store.clips()
    facts = Clips(
        len(clips),
        sum(last_s is None or clip.captured_s > last_s for clip in clips),
        None if last_s is None else time.time() - last_s,
        runtime.affordable,
    )
    match due(runtime.state, facts, wanted):
        case Task.PREPARE:
            worker.start(lambda: runtime.run(until=Phase.ENCODE, patient=True))
        case Task.PERSONALISE if life.learns:
            worker.start(lambda: runtime.run(patient=True))
        case Task.AGAIN if life.learns:
            runtime.personalise_again()
            worker.start(lambda: runtime.run(patient=True))


def _existing_store(state: Path, person: str) -> ClipStore:
    root = person_folder(state, person) if person else state
    if not root.is_dir():
        raise IsthmusError(f"{root} is no folder of a device: 'isthmus edge run --state {state} ...' makes one")
    return store_of(DeviceState(root))
