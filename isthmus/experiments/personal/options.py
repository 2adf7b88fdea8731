"""Options of ``isthmus experiment`` paper, people and cost. Free of torch, so that help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from typer import Option

from isthmus.command_line import Layout

Data = Annotated[Path, Option(help="A data set in the published layout of CREMA-D or AVE.")]
Out = Annotated[Path, Option(help="Folder to write to: cells, result.json, result.md, pictures and report.html.")]
Preset = Annotated[
    Literal["thesis", "small", "smoke", "demo", "tiny"] | None,
    Option(help="Sizes and schedules of a new release: smoke takes minutes, tiny seconds. Default: small."),
]
PRESET: Final = "small"
"""The preset of a new release if none is given."""
Seeds = Annotated[int, Option(help="Number of seeds: 0, 1 and so on. The paper's gaps need 5 or more.", min=1)]
Workers = Annotated[int, Option(help="Number of processes, each of one thread. 0: one per core.", min=0)]
Device = Annotated[
    str, Option(help="Where teachers, students and cells are trained: 'cpu', or 'cuda' with --workers 1.")
]
Weights = Annotated[
    Path | None,
    Option(
        help="For new releases: folder with ImageNet weights, one file per trunk: torchvision's own, such as "
        "resnet18-f37072fd.pth, or resnet18.safetensors with the same names. Default: random weights."
    ),
]
Balance = Annotated[
    Literal["unimodal", "ogm-ge", "joint"] | None,
    Option(
        help="For new releases: how the teacher's branches are trained, as in 'isthmus distill teacher'. 'joint' is "
        "the paper's plain cross-entropy. Default: the preset's."
    ),
]
HeldOut = Annotated[
    float | None, Option(help="For new releases: share of the public clips held out for the teacher's head.")
]
ModalityDropout = Annotated[
    float | None,
    Option(help="For new releases: probability that a head in training gets no sound; the same for the picture."),
]


@dataclass(frozen=True)
class PaperOptions:
    """Options of ``isthmus experiment paper``."""

    data: Data
    out: Out
    release: Annotated[Path | None, Option(help="A release to use. Default: one is made in OUT/release.")] = None
    preset: Preset = None
    layout: Layout = "auto"
    private_actors: Annotated[
        str, Option(help="For a new release: actors that are kept private, with commas. Each becomes one client.")
    ] = ""
    private_list: Annotated[Path | None, Option(help="For a new release: the published list of private clips.")] = None
    weights: Weights = None
    balance: Balance = None
    held_out: HeldOut = None
    modality_dropout: ModalityDropout = None
    own_teachers: Annotated[
        bool,
        Option(
            help="Train a teacher per seed, in OUT/release-1 and so on, instead of one for all seeds. Differences then "
            "vary with the teacher, too."
        ),
    ] = False
    seeds: Seeds = 5
    scenarios: Annotated[str, Option(help="Scenarios, with commas: sensitive to latency, or insensitive.")] = (
        "sensitive,insensitive"
    )
    ladder: Annotated[
        str,
        Option(
            help="Methods beside the paper's four, with commas, in the latency-sensitive scenario. 'none': no others."
        ),
    ] = (
        "cluster-whole,round-robin,quota,transport,density-ratio,round-robin+features,quota+features,transport+features,"
        "kept,kept-transport,kept-random,oracle,own"
    )
    clips_per_cluster: Annotated[str, Option(help="Clips per cluster, with commas: the axis of Figure 5.12.")] = (
        "3,6,9,12"
    )
    upload_shares: Annotated[
        str, Option(help="Shares of the selection clips, with commas: the axis of Figure 5.13.")
    ] = "0.25,0.5,0.75,1"
    workers: Workers = 0
    device: Device = "cpu"


@dataclass(frozen=True)
class PeopleOptions:
    """Options of ``isthmus experiment people``."""

    data: Data
    out: Out
    preset: Preset = None
    layout: Layout = "auto"
    methods: Annotated[str, Option(help="Methods, with commas, of those that 'isthmus experiment paper' compares.")] = (
        "all,random,cluster,kept"
    )
    seeds: Seeds = 1
    weights: Weights = None
    balance: Balance = None
    held_out: HeldOut = None
    modality_dropout: ModalityDropout = None
    sound_trunk: Annotated[
        str | None,
        Option(
            help="Pretrained trunk for sound, as in 'isthmus distill teacher'. With trunks the student is the teacher, "
            "so only what helps on the device is measured, not --methods."
        ),
    ] = None
    picture_trunk: Annotated[str | None, Option(help="The same for pictures. Both are given, or neither.")] = None
    student_trunk: Annotated[
        Literal["resnet18", "resnet18-quarter"] | None,
        Option(help="With pretrained trunks: distil a student with this network per modality, and measure --methods."),
    ] = None
    together: Annotated[
        int,
        Option(
            help="Number of persons left out of one release. More persons need fewer trainings of a teacher.", min=1
        ),
    ] = 1
    classes: Annotated[
        str,
        Option(help="Numbers of classes, with commas: each person is made a user of so many. 0: of all they have."),
    ] = "0"
    workers: Workers = 0
    device: Device = "cpu"


@dataclass(frozen=True)
class CostOptions:
    """Options of ``isthmus experiment cost``."""

    data: Data
    release: Annotated[Path, Option(help="A release whose teacher is trained.")]
    out: Out
    layout: Layout = "auto"
    clients: Annotated[str, Option(help="Clients, with commas. Default: all of the release's.")] = ""
    seeds: Seeds = 1
    plain_rounds: Annotated[int, Option(help="Rounds of the paper's own loop. The paper has 15.", min=1)] = 15
    plain_epochs: Annotated[int, Option(help="Epochs of the paper's own loop. The paper has 150.", min=1)] = 150
