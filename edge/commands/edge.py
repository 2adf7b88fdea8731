"""``isthmus edge``: run the device, show what would leave it, show its state, go back to the previous student."""

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from isthmus.command_line import App, numbers
from isthmus.edge.commands.options import ClipOptions, CloudOptions, RunOptions, State, UploadOptions

app = App("isthmus edge", help="Run the device, and show what would leave it.", extra="edge")


@app.command(
    resumes=True,
    example="""
    isthmus edge run --cloud 127.0.0.1:50051 --state device
    isthmus edge run --cloud 127.0.0.1:50051 --state device --data clips --once --report report.json
    """,
)
def run(
    cloud: Annotated[str, Option(help="The cloud's address, HOST:PORT.")],
    state: State,
    clips: ClipOptions,
    upload: UploadOptions,
    known_as: CloudOptions,
    asked: RunOptions,
) -> None:
    """Personalise this device's student and answer clips with it.

    Needs a running 'isthmus cloud serve --release ...', and a camera, a microphone or a folder of clips. Writes its
    state to --state, and --report if it is given.

    Without --data the device captures its own clips from camera and microphone, answers them, and stores them for a
    week at most. It personalises once it has --clips-before of them, and at most once a day after that. 'isthmus edge
    clips' shows, deletes and pauses.

    With --data it replays a data set. The device enrols, fetches the base student, sends prototypes of the selection
    clips, follows the cloud's work, fetches and verifies the finished student, and starts to use it if it is better.
    Then it answers the test clips: through the cloud at each ratio, and alone. A run that was interrupted continues.
    Without --once the device keeps answering new clips in the data folder, or those of the camera, until it is
    interrupted.
    """
    ratios = numbers(asked.ratios, "--ratios", distinct=True)

    from isthmus.edge.commands.running import run

    run(cloud, state, clips, upload, known_as, asked, ratios)


@app.command(example="isthmus edge prototypes --state device --data clips --cloud 127.0.0.1:50051")
def prototypes(
    state: State,
    clips: ClipOptions,
    upload: UploadOptions,
    known_as: CloudOptions,
    json: Annotated[bool, Option("--json", help="Print JSON with the exact numbers, for another program.")] = False,
    cloud: Annotated[
        str, Option(help="The cloud's address, HOST:PORT. Only a device without a student needs it, to fetch the base.")
    ] = "",
) -> None:
    """Show exactly what would leave this device, in bytes and in plain words. Nothing of your clips is sent.

    Needs a folder of clips, and a student: of an earlier run in --state, or the base student from --cloud. Writes the
    base student to --state if it was fetched.
    """
    from isthmus.edge.commands.running import prototypes

    prototypes(state, clips, upload, known_as, as_json=json, cloud=cloud)


@app.command(example="isthmus edge enrol --again --cloud 127.0.0.1:50051 --state device")
def enrol(
    cloud: Annotated[str, Option(help="The cloud's address, HOST:PORT.")],
    state: State,
    known_as: CloudOptions,
    again: Annotated[
        bool, Option("--again", help="Replace the present identity: the cloud has lost it, or it is another cloud.")
    ] = False,
) -> None:
    """Make this device known to a cloud, and pin the cloud's signing key.

    Needs a running 'isthmus cloud serve --release ...'. Writes the new identity to --state. 'isthmus edge run' enrols a
    new device by itself. Use --again if the cloud was set up again. Students that the new key verifies stay; others are
    fetched again. Earlier uploads and the privacy budget stay counted.
    """
    from isthmus.edge.commands.running import enrol

    enrol(cloud, state, known_as, again=again)


@app.command(example="isthmus edge status --state device")
def status(
    state: State,
    json: Annotated[bool, Option("--json", help="Print JSON, for another program.")] = False,
) -> None:
    """Show the state of this device: identity, phase, students, and everything that it has ever sent of its user.

    Needs the --state folder of 'isthmus edge run'. Writes nothing. If the device runs, it answers itself, and says what
    it is waiting for.
    """
    from isthmus.edge.commands.running import status

    status(state, as_json=json)


@app.command(example="isthmus edge correct clip_0042 happy --state device")
def correct(
    state: State,
    clip: Annotated[str, Argument(help="Name of a clip that this device has seen lately.")] = "",
    label: Annotated[str, Argument(help="The class that is right, by its name.")] = "",
    undo: Annotated[bool, Option("--undo", help="Take back the newest correction instead.")] = False,
) -> None:
    """Say what a clip really was. The device learns from it and keeps it to itself.

    Needs the --state folder of 'isthmus edge run' and a student with a person model. Writes the correction to it.
    --undo brings back exactly the answers before the newest correction. Corrections of one clip that contradict each
    other are weighed. No correction is ever sent.
    """
    if undo == bool(clip or label) or (clip and not label):
        raise BadParameter("give a clip and its label, or --undo alone", param_hint="CLIP LABEL")

    from isthmus.edge.commands.running import correct

    correct(state, clip, label, undo=undo)


@app.command(example="isthmus edge ask --state device")
def ask(
    state: State,
    a_day: Annotated[
        int | None,
        Option(min=0, max=1000, help="How many questions a day are allowed from now on. 0: none. Default: 5."),
    ] = None,
    json: Annotated[bool, Option("--json", help="Print JSON, for another program.")] = False,
) -> None:
    """Ask about the clip from which this device would learn most: the one it is least sure about.

    Needs the --state folder of 'isthmus edge run' and a student with a person model. Writes the time of the question to
    it. Clips without sound or without picture are never asked about. Answer with 'isthmus edge correct'.
    """
    from isthmus.edge.commands.running import question

    question(state, a_day, as_json=json)


@app.command(example="isthmus edge rollback --state device")
def rollback(state: State) -> None:
    """Go back to the student that was in use before. A second rollback goes forward again.

    Needs the --state folder of 'isthmus edge run' with at least two students. The folder keeps both. A running device
    changes at once and goes on with its work.
    """
    from isthmus.edge.commands.running import rollback

    rollback(state)


@app.command(
    example="""
    isthmus edge reply "I missed my train." --server http://127.0.0.1:8000 --state device
    """
)
def reply(
    text: Annotated[str, Argument(help="What you say.")],
    server: Annotated[str, Option(help="Address of a server of 'isthmus generate serve', such as http://HOST:PORT.")],
    state: State,
    max_tokens: Annotated[int, Option(min=1, help="Longest reply, in tokens.")] = 96,
    seed: Annotated[int | None, Option(help="Seed of the draws. Default: another one each time.")] = None,
    key_file: Annotated[Path | None, Option(help="File with the API key that the server asks for.")] = None,
    tls_cert: Annotated[Path | None, Option(help="PEM certificate to trust, for https://.")] = None,
    json: Annotated[bool, Option("--json", help="Print JSON: the reply, and what was sent with the text.")] = False,
) -> None:
    """Ask a language model for a reply, with how you feel if 'isthmus edge run --share-state' allows it.

    Needs the --state folder of 'isthmus edge run', whether the device runs or not, and a server. What is sent of how
    you feel is the class and the rounded probability of the newest answer of the last ten minutes. It is printed on
    standard error and counted in 'isthmus edge status'. Without consent, or without a recent answer, only the text is
    sent.
    """
    from isthmus.edge.commands.replying import reply

    reply(text, server, state, max_tokens=max_tokens, seed=seed, key_file=key_file, tls_cert=tls_cert, as_json=json)


Person = Annotated[str, Option(help="Whose part, on a device that several people share.")]


@app.command(
    example="""
    isthmus edge forget --cloud 127.0.0.1:50051 --state device
    isthmus edge forget --cloud 127.0.0.1:50051 --state device --person anna
    """
)
def forget(
    state: State,
    cloud: Annotated[str, Option(help="The cloud's address, HOST:PORT. Needed unless --only-here is given.")] = "",
    only_here: Annotated[
        bool, Option("--only-here", help="Erase the folder alone; what the cloud holds stays there.")
    ] = False,
    tls: Annotated[bool, Option("--tls", help="Use TLS with the system's certificate authorities.")] = False,
    tls_ca: Annotated[Path | None, Option(help="Use TLS with the certificate authorities in this PEM file.")] = None,
    tls_cert: Annotated[Path | None, Option(help="This device's certificate (PEM), if the cloud asks for one.")] = None,
    tls_key: Annotated[Path | None, Option(help="Private key (PEM) of --tls-cert.")] = None,
    person: Person = "",
) -> None:
    """Erase this device: its prototypes, jobs and students in the cloud, then all that its folder holds.

    Needs the --state folder of 'isthmus edge run', of a device that does not run, and the cloud it enrolled with. With
    --person only this person's part of a shared device is erased, and without it everybody's. It cannot be undone. The
    count of uploads and of the privacy budget is erased too. Prints what was erased.
    """
    if bool(cloud) == only_here:
        raise BadParameter("give either --cloud HOST:PORT or --only-here")

    from isthmus.edge.commands.forgetting import forget

    known_as = CloudOptions(tls=tls, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
    forget(cloud, state, known_as, person)


@app.command(example="isthmus edge page --state device", extra="page")
def page(
    state: State,
    port: Annotated[int, Option(min=0, max=65535, help="Port on 127.0.0.1. 0: any that is free.")] = 8470,
    person: Annotated[str, Option(help="Whose page, on a device that several people share.")] = "",
) -> None:
    """Serve this device's own page on this machine: what it sees, how it answers, what it learned, and what it sent.

    Needs the --state folder of 'isthmus edge run'. The device should be running; the page says so if it is not. Prints
    the page's address, which holds a secret token, and serves until it is interrupted. Writes the token to --state.
    Nothing of the page is loaded from elsewhere, and it answers on 127.0.0.1 alone.
    """
    from isthmus.edge.commands.page import page

    page(state, person, port)


clips = App(
    "isthmus edge clips", help="Show, keep and delete what the device has captured, and pause it.", extra="edge"
)

Names = Annotated[list[str], Argument(help="Names of clips, as 'isthmus edge clips list' shows them.")]


@clips.command("list", example="isthmus edge clips list --state device")
def list_clips(state: State, person: Person = "") -> None:
    """List the clips that the device has captured: when, what each has, and how large it is.

    Needs the --state folder of 'isthmus edge run'. Writes nothing. Any player shows the files in its folder 'clips'.
    """
    from isthmus.edge.commands.living import show_clips

    show_clips(state, person)


@clips.command("delete", example="isthmus edge clips delete --all --state device")
def delete_clips(
    state: State,
    names: Annotated[
        list[str] | None, Argument(help="Names of clips, as 'isthmus edge clips list' shows them.")
    ] = None,
    all: Annotated[bool, Option("--all", help="Delete every clip.")] = False,
    person: Person = "",
) -> None:
    """Delete clips that the device has captured.

    Needs the --state folder of 'isthmus edge run'; the device may be running. Writes to --state. A student that was
    made of them stays.
    """
    from isthmus.edge.commands.living import delete_clips

    delete_clips(state, person, names or [], everything=all)


@clips.command("keep", example="isthmus edge clips keep 20261130T101500-250 --state device")
def keep_clips(names: Names, state: State, person: Person = "") -> None:
    """Keep clips beyond their time. Others are deleted after a week, or when there are too many.

    Needs the --state folder of 'isthmus edge run'. Writes to --state.
    """
    from isthmus.edge.commands.living import change_clips

    change_clips(state, person, "keep", names)


@clips.command("pause", example="isthmus edge clips pause --state device")
def pause(state: State, person: Person = "") -> None:
    """Pause capture: camera and microphone are closed, also over restarts, until 'isthmus edge clips resume'.

    Needs the --state folder of 'isthmus edge run'; the device may be running. Writes to --state.
    """
    from isthmus.edge.commands.living import change_clips

    change_clips(state, person, "pause", [])


@clips.command("resume", example="isthmus edge clips resume --state device")
def resume(state: State, person: Person = "") -> None:
    """Go on capturing after a pause.

    Needs the --state folder of 'isthmus edge run'. Writes to --state.
    """
    from isthmus.edge.commands.living import change_clips

    change_clips(state, person, "resume", [])


app.add(clips)
