"""Options of the commands of ``isthmus edge``. Free of the libraries of the device, so that help is fast."""

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from isthmus.command_line import Layout

THIS_MACHINE = platform.node() or "device"

State = Annotated[Path, Option(help="Folder of this device: its identity, its students and its outbox.")]


@dataclass(frozen=True)
class ClipOptions:
    """Which clips the device uses."""

    data: Annotated[
        Path | None,
        Option(
            help="Folder of clips in the layout of CREMA-D or AVE. Default: what the device has captured itself.",
            exists=True,
            file_okay=False,
        ),
    ] = None
    layout: Layout = "auto"
    actor: Annotated[list[str], Option(help="Use this actor's clips alone. Repeat it for more actors.")] = field(
        default_factory=list
    )
    clips: Annotated[
        Path | None, Option(help="File with one clip name per line. Use these clips alone. Default: all.")
    ] = None
    selection_clips: Annotated[
        Path | None,
        Option(help="File with the names of the clips that prototypes are made of. Needs --test-clips. Default: half."),
    ] = None
    test_clips: Annotated[
        Path | None,
        Option(help="File with the names of the clips to answer. Needs --selection-clips. Default: the other half."),
    ] = None
    seed: Annotated[int, Option(help="Seed of the two halves, of k-means, and of the cloud's work.")] = 0


@dataclass(frozen=True)
class UploadOptions:
    """What the device sends of its clips."""

    min_cluster: Annotated[int, Option(min=1, help="Smallest number of clips that a prototype averages.")] = 3
    clips_per_cluster: Annotated[
        int, Option(min=1, help="Mean number of clips per prototype: k-means makes clips / this many clusters.")
    ] = 3
    mode: Annotated[
        Literal["prototypes", "probabilities", "features"],
        Option(
            help="What is sent: prototypes (averages), probabilities (those of each clip: less private), or features "
            "(averages of features too: they reveal most, and let the cloud choose best)."
        ),
    ] = "prototypes"
    noise: Annotated[
        float | None, Option(help="Add Laplace noise of this epsilon to every upload. Default: no noise.")
    ] = None
    epsilon_budget: Annotated[
        float | None,
        Option(
            min=0,
            help="The most epsilon that all uploads of this device may spend over its life. It is kept; inf lifts it. "
            "Default: the budget that is known, else with --noise the rounds times the noise.",
        ),
    ] = None


@dataclass(frozen=True)
class CloudOptions:
    """How the device makes itself known to the cloud."""

    name: Annotated[str, Option(help="Name of this device, as the cloud's operator sees it.")] = THIS_MACHINE
    enrolment_key_file: Annotated[
        Path | None, Option(help="File with the cloud's enrolment key, if the cloud asks for one.")
    ] = None
    tls: Annotated[bool, Option("--tls", help="Use TLS with the system's certificate authorities.")] = False
    tls_ca: Annotated[Path | None, Option(help="Use TLS with the certificate authorities in this PEM file.")] = None
    tls_cert: Annotated[
        Path | None,
        Option(help="This device's certificate (PEM), if the cloud asks for one. Needs --tls-key and TLS."),
    ] = None
    tls_key: Annotated[Path | None, Option(help="Private key (PEM) of --tls-cert.")] = None

    @property
    def own_certificate(self) -> tuple[Path, Path] | None:
        """The files of the device's certificate and its key. Raises ValueError if one is given without the other."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("a device's certificate needs both --tls-cert and --tls-key")
        return None if self.tls_cert is None or self.tls_key is None else (self.tls_cert, self.tls_key)


@dataclass(frozen=True)
class RunOptions:
    """Options of ``isthmus edge run`` alone."""

    ratios: Annotated[
        str,
        Option(
            help="With --data: compression ratios at which the test clips are answered through the cloud, such as 1,2. "
            "Default: all. For live clips the device chooses by the link."
        ),
    ] = ""
    number_type: Annotated[
        Literal["fp32", "fp16", "int8"],
        Option(
            help="With --data: number type in which features of the test clips are sent. For live clips the device "
            "chooses by the link."
        ),
    ] = "fp16"
    report: Annotated[Path | None, Option(help="JSON file to write the report to.")] = None
    rounds: Annotated[
        int,
        Option(
            min=0,
            max=100,
            help="The most uploads of one personalisation. 0: the number that was pinned when the device enrolled.",
        ),
    ] = 0
    latency_budget_ms: Annotated[
        float, Option(min=1, help="Milliseconds within which a live clip is to be answered.")
    ] = 200.0
    once: Annotated[bool, Option("--once", help="End after the clips that are there now.")] = False
    camera: Annotated[
        str | None,
        Option(
            help="A camera's number, 'picamera', the path of a film that plays as a camera, or 'none'. With --data: "
            "answer it afterwards, in place of new files. Default without --data: 0."
        ),
    ] = None
    microphone: Annotated[
        str,
        Option(
            help="Number or part of the name of a microphone, the path of a sound file that plays as one, or 'none'. "
            "Default: the system's."
        ),
    ] = ""
    gate: Annotated[
        bool,
        Option(
            "--gate/--no-gate",
            help="Answer captured clips only if there is a voice or a face, and cut the picture around the face.",
        ),
    ] = True
    framing: Annotated[
        float,
        Option(
            min=1,
            max=6,
            help="Side of the square that is cut around a face, in widths of the face, as the cloud's teacher knows "
            "them: about 2.5 for CREMA-D, 1 for faces that fill the picture.",
        ),
    ] = 1.5
    clips_before: Annotated[int, Option(min=6, max=200, help="Captured clips after which the device personalises.")] = (
        24
    )
    person: Annotated[
        str,
        Option(
            help="Who uses the device now, on a shared one. Each person has a device of their own in --state: clips, "
            "habits, corrections and student."
        ),
    ] = ""
    ask_cloud: Annotated[
        bool,
        Option(
            "--ask-cloud/--no-ask-cloud",
            help="Ask the cloud about live clips when the link is good. With --no-ask-cloud the device answers alone, "
            "and no features of a clip leave it; not with --data.",
        ),
    ] = True
    guard: Annotated[
        bool,
        Option(
            "--guard/--no-guard",
            help="Compare a new student with the current one on the selection clips, without labels, and refuse it if "
            "it is not better. Without the guard every new student is accepted.",
        ),
    ] = True
    habits: Annotated[
        bool,
        Option(
            "--habits/--no-habits",
            help="Estimate how often you are in each state, and take it into account in answers. The estimate uses "
            "unlabelled selection clips and stays on this device.",
        ),
    ] = True
    follow_releases: Annotated[
        bool,
        Option(
            "--follow-releases/--no-follow-releases",
            help="When the cloud offers another base student, personalise on it without being asked, within the "
            "privacy budget. The new student is compared with the current one like any other.",
        ),
    ] = True
    again: Annotated[bool, Option("--again", help="Personalise again, from the current student.")] = False
    share_state: Annotated[
        bool,
        Option(
            "--share-state",
            help="Allow 'isthmus edge reply' to send how you feel with what you say: the class of the newest answer "
            "and its probability, rounded to 0.1. Without this flag nothing of it is kept or sent.",
        ),
    ] = False
