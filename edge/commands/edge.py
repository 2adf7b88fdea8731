"""``isthmus edge``: run the device, show what would leave it, show its state, go back to the previous student."""

from typing import Annotated

from typer import Option

from isthmus.command_line import App, numbers
from isthmus.edge.commands.options import ClipOptions, CloudOptions, RunOptions, State, UploadOptions

app = App("isthmus edge", help="Run the device, and show what would leave it.", extra="edge")


@app.command(
    resumes=True,
    example="isthmus edge run --cloud 127.0.0.1:50051 --state device --data clips --once --report report.json",
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

    Needs a running 'isthmus cloud serve --release ...' and a folder of clips. Writes its state to --state, and --report
    if it is given.

    The device enrols, fetches the base student, sends prototypes of the selection clips, follows the cloud's work,
    fetches and verifies the finished student, and starts to use it if it is better. Then it answers the test clips:
    through the cloud at each ratio, and alone. A run that was interrupted continues. Without --once the device keeps
    answering new clips in the data folder, or those of the camera, until it is interrupted.
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
    new device by itself. Use --again if the cloud was set up anew. Students that the new key verifies stay; others are
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


@app.command(example="isthmus edge rollback --state device")
def rollback(state: State) -> None:
    """Go back to the student that was in use before. A second rollback goes forward again.

    Needs the --state folder of 'isthmus edge run' with at least two students. The folder keeps both. A running device
    changes at once and goes on with its work.
    """
    from isthmus.edge.commands.running import rollback

    rollback(state)
