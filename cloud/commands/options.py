"""Options of the commands of ``isthmus elastic``. Free of torch, so that help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder
from isthmus.command_line import Device, Seed, Threads, whole_numbers

Model = Annotated[
    str,
    typer.Option(
        help="The vision transformer: a safetensors file with timm's weight names (its config.json beside it is read), "
        "ARCHITECTURE=FILE, or a timm model name."
    ),
]
Pixels = Annotated[
    str | None,
    typer.Option(
        help="Mean and deviation with which the model reads pictures: cifar10, imagenet or half. Default: the model's."
    ),
]
Data = Annotated[
    Path,
    typer.Option(
        help="Labelled pictures: a Parquet file, a folder of its shards, or a pattern such as 'data/train-*.parquet'."
    ),
]
ImageColumn = Annotated[str | None, typer.Option(help="Column of the pictures. Default: image or img.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels, whole numbers. Default: label or labels.")]
Held = Annotated[
    float,
    typer.Option(min=0.01, max=1.0, help="Share of the pictures that is held out to profile. 1 uses all for both."),
]
Limit = Annotated[int | None, typer.Option(min=2, help="Use this many pictures, drawn at random. Default: all.")]
Tasks = Annotated[Path, typer.Option(help="Folder of tasks that 'isthmus elastic prompts' wrote.")]
TaskSource = Annotated[
    str,
    typer.Option(
        help="cifar10, animals-vehicles, animals, or a JSON file with name, classes and class_of_label (null leaves a "
        "label out)."
    ),
]
Mode = Literal["append", "replace"]
MergeOrderOption = Annotated[
    MergeOrder | None,
    typer.Option(
        help="Order in which a layer hands merged tokens on: that of the ToMe paper, or ours. Default: the order of "
        "what is continued or used (files and folders of before), and published for something new."
    ),
]
WarmFolder = Annotated[
    Path | None, typer.Option(help="Folder of warmed models: OUT/models of 'isthmus elastic warmup run'.")
]


def ascending(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of a list with commas, ascending, each once. Raises a usage error naming the option."""
    return tuple(sorted(set(whole_numbers(text, option))))


@dataclass(frozen=True)
class Picturing:
    """How pictures are chosen and read, and where the model runs."""

    held: Held = 0.2
    limit: Limit = None
    pixels: Pixels = None
    seed: Seed = 0
    device: Device = "auto"
    threads: Threads = 0
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    merge_order: MergeOrderOption = None


@dataclass(frozen=True)
class PromptOptions:
    """Options of ``isthmus elastic prompts``."""

    model: Model
    data: Data
    out: Annotated[Path, typer.Option(help="Folder to write the task's files to.")]
    task: TaskSource = "cifar10"
    mode: Annotated[Mode, typer.Option(help="Append to the prompts of the layer before, or replace them.")] = "append"
    gammas: Annotated[str, typer.Option(help="Numbers of prompts per layer to learn, with commas.")] = "2,4,8"
    measured: Annotated[
        str,
        typer.Option(help="Gammas up to 0 at which to measure accuracy, with commas. -5 merges 5 tokens per layer."),
    ] = "-20,-15,-10,-5,0"
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training per number of prompts.")] = 50
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the prompts.")] = 0.001


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of ``isthmus elastic schedules``."""

    model: Model
    data: Data
    tasks: Tasks
    out: Annotated[Path, typer.Option(help="JSON file to write: what was tried, and the best schedule of each gamma.")]
    gammas: Annotated[str, typer.Option(help="Gammas below 0 to search schedules for, with commas.")] = "-20,-15,-10,-5"
    evaluations: Annotated[int, typer.Option(min=1, help="Largest number of schedules to try per gamma.")] = 40


@dataclass(frozen=True)
class ProfileOptions:
    """Options of ``isthmus elastic profile``."""

    model: Model
    out: Annotated[Path, typer.Option(help="JSON file to write. A picture of the same name (PNG) is drawn beside it.")]
    tasks: Annotated[Path | None, typer.Option(help="Folder of tasks whose accuracy is measured. Needs --data.")] = None
    data: Annotated[Path | None, typer.Option(help="Labelled pictures for --tasks: a Parquet file.")] = None
    schedules: Annotated[Path | None, typer.Option(help="File that 'isthmus elastic schedules' wrote.")] = None
    gammas: Annotated[
        str, typer.Option(help="Gammas to measure, with commas: below 0 tokens are merged, above 0 prompts are added.")
    ] = "-20,-15,-10,-5,0,2,4,8"
    experts: Annotated[
        str,
        typer.Option(
            help="Numbers of experts per token to measure, with commas, for a model with experts. Default: all up to "
            "its usual number."
        ),
    ] = ""
    sizes: Annotated[str, typer.Option(help="Batch sizes to measure, with commas.")] = "1,2,4,8,16,32,64"
    mode: Annotated[Mode, typer.Option(help="Way of prompting whose times are measured above gamma 0.")] = "append"
    repeats: Annotated[int, typer.Option(min=1, help="Number of times that each batch is timed.")] = 5
    number_type: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"],
        typer.Option(help="Number type of the model. 'auto' measures which is fastest without changing the answers."),
    ] = "auto"
    compiler: Annotated[str | None, typer.Option(help="A backend of torch.compile, such as inductor.")] = None
    warm: Annotated[
        Path | None,
        typer.Option(
            help="Folder of warmed models, whose accuracies replace the vanilla model's; with pruning, their times too."
        ),
    ] = None
    random: Annotated[bool, typer.Option(help="Give a timm model random weights: only its speed is measured then.")] = (
        False
    )


@dataclass(frozen=True)
class VariantOptions:
    """Options of ``isthmus elastic variants``."""

    base: Annotated[
        str,
        typer.Option(
            help="The base model, trained for the task: a safetensors file with timm's weight names, or "
            "ARCHITECTURE=FILE. The load is measured by what it serves."
        ),
    ]
    data: Annotated[
        Path, typer.Option(help="Labelled pictures that no model was trained on, to measure accuracy: a Parquet file.")
    ]
    out: Annotated[Path, typer.Option(help="Folder to add the task to.")]
    small: Annotated[str | None, typer.Option(help="A smaller model of the same task.")] = None
    large: Annotated[str | None, typer.Option(help="A larger model of the same task.")] = None
    task: TaskSource = "cifar10"
    sizes: Annotated[str, typer.Option(help="Batch sizes to time, with commas.")] = "1,2,4,8,16,32,64"
    repeats: Annotated[int, typer.Option(min=1, help="Number of times that each batch is timed.")] = 5
    number_type: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Number type of all models of the folder.")
    ] = "float32"
    pixels: Pixels = None
    limit: Limit = None
    seed: Seed = 0
    device: Device = "auto"
    threads: Threads = 0
    image_column: ImageColumn = None
    label_column: LabelColumn = None


@dataclass(frozen=True)
class ExpertOptions:
    """Options of ``isthmus elastic experts``."""

    model: Model
    data: Data
    out: Annotated[Path, typer.Option(help="Folder to write to: the model's folder in model/, its tasks in tasks/.")]
    task: Annotated[
        list[str],
        typer.Option(
            help="A task to learn: cifar10, animals-vehicles, animals, or a JSON file as for 'prompts'. Repeat it for "
            "more. TASK@DATA takes the task's pictures from another Parquet file."
        ),
    ]
    experts: Annotated[int, typer.Option(min=1, max=64, help="Experts per layer that has some.")] = 16
    used: Annotated[int, typer.Option(min=1, max=64, help="Experts that a token uses.")] = 4
    ratio: Annotated[
        float, typer.Option(min=0.01, help="Hidden units of an expert, as a multiple of the model's width.")
    ] = 1.0
    router: Annotated[
        Literal["task", "shared"],
        typer.Option(help="One router per task, or one that reads the token beside an embedding of the task."),
    ] = "task"
    window: Annotated[
        int | None, typer.Option(min=1, help="Experts that each task may use, in a window of its own. Default: all.")
    ] = None
    start: Annotated[
        Literal["apart", "even"],
        typer.Option(help="Each task's router begins on experts that together are the dense MLP, or on all alike."),
    ] = "apart"
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 10
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures per training step, of all tasks together.")] = 64
    learning_rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Pictures of each task per epoch. Default: as many as the largest has.")
    ] = None
    augment: Annotated[
        bool,
        typer.Option(
            "--augment/--no-augment",
            help="Shift and mirror pictures while learning. Turn it off if positions decide the class of a task.",
        ),
    ] = True
    measured: Annotated[
        str, typer.Option(help="Gammas up to 0 at which to measure accuracy, with commas, for each number of experts.")
    ] = "-20,-15,-10,-5,0"


@dataclass(frozen=True)
class ReplayOptions:
    """Options of ``isthmus elastic replay``."""

    trace: Annotated[
        str,
        typer.Argument(help="'synthetic', or a CSV file of the Azure Functions 2021 or the Azure LLM 2023 traces."),
    ] = "synthetic"
    policy: Annotated[
        str,
        typer.Option(
            help="Scheduling policy: priced, exact, otas, pets, clipper, throughput, fixed:G for gamma G always, "
            "dynamic:SIZES:MS for Triton's dynamic batcher (dynamic:16+32:5: preferred sizes, largest delay in ms), or "
            "infaas:GB for INFaaS with so much memory for its models (16 by default; with --variants, those of the "
            "folder, else three assumed sizes)."
        ),
    ] = "priced"
    profile: Annotated[
        Path | None, typer.Option(help="A measured profile (JSON). Default: a profile like the paper's.")
    ] = None
    load: Annotated[
        float, typer.Option(help="Mean arrival rate, as a multiple of what the model serves at gamma 0.", min=0.01)
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of arrivals, kinds of query, and which answers are right.")] = 0
    duration_s: Annotated[float, typer.Option(help="Length of the synthetic trace in seconds.", min=1, max=36_000)] = (
        60.0
    )
    window_s: Annotated[
        float, typer.Option(help="Seconds of a recorded trace that are replayed per second.", min=0.01)
    ] = 60.0
    out: Annotated[Path | None, typer.Option(help="JSON file to write every batch and the totals to.")] = None
    executors: Annotated[
        int, typer.Option(help="Batches that run at once. The load grows with them.", min=1, max=64)
    ] = 1
    executor: Annotated[
        Literal["thread", "process"],
        typer.Option(help="Live: run batches in threads, or in processes of their own as 'isthmus cloud serve' does."),
    ] = "thread"
    margin: Annotated[
        float | None,
        typer.Option(
            help="Plan as if batches took this share longer than the profile says. Default: follow the measured times.",
            min=0,
            max=10,
        ),
    ] = None
    pace: Annotated[
        float,
        typer.Option(
            help="Simulated replay: batches take this multiple of the profile's times. A live replay reports its pace.",
            min=0.1,
            max=10,
        ),
    ] = 1.0
    live: Annotated[
        bool,
        typer.Option(
            "--live/--simulate", help="Run the model in real time, or simulate with the profile and a virtual clock."
        ),
    ] = False
    server: Annotated[
        str | None,
        typer.Option(
            help="Send the queries to a running 'isthmus cloud serve --elastic-model ...' (HOST:PORT), in real time, "
            "and simulate the same queries beside it. Name the server's profile and policy."
        ),
    ] = None
    key_file: Annotated[Path | None, typer.Option(help="Server: file with the key that it asks its clients for.")] = (
        None
    )
    tls_cert: Annotated[
        Path | None, typer.Option(help="Server: PEM certificate to trust. Without one nothing is encrypted.")
    ] = None
    connections: Annotated[int, typer.Option(help="Server: number of connections.", min=1, max=4_096)] = 8
    paired: Annotated[
        bool,
        typer.Option(
            "--paired/--not-paired",
            help="Server: ask it afterwards what it answers where the simulation chose another gamma, so that right "
            "answers are compared picture by picture, without the luck of the draw.",
        ),
    ] = False
    model: Annotated[str | None, typer.Option(help="Live: the model's safetensors file, or its name in timm.")] = None
    tasks: Annotated[
        Path | None, typer.Option(help="Live or server: folder of tasks of 'isthmus elastic prompts'.")
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            help="Live or server: labelled pictures to ask about (Parquet). Take pictures on which no profile was "
            "measured."
        ),
    ] = None
    variants: Annotated[
        Path | None,
        typer.Option(
            help="Folder of 'isthmus elastic variants', with --policy infaas:GB: its sizes and its profile are used."
        ),
    ] = None
    warm: WarmFolder = None
    warm_bytes: Annotated[
        int | None, typer.Option(help="Live: bytes of memory for warmed models. Default: enough for all.")
    ] = None
    pixels: Annotated[
        str | None, typer.Option(help="Live: cifar10, imagenet or half. Default: the model's own statistics.")
    ] = None
    device: Annotated[str, typer.Option(help="Live: 'cpu', 'cuda', or 'auto' for a GPU if there is one.")] = "auto"
    limit: Annotated[int | None, typer.Option(help="Live: ask about this many pictures, drawn at random.", min=2)] = (
        2_000
    )
    image_column: ImageColumn = None
    label_column: LabelColumn = None


@dataclass(frozen=True)
class WarmupOptions:
    """Options that ``isthmus elastic warmup`` plan, run, ensemble and evaluate share."""

    model: Model
    data: Data
    out: Annotated[Path, typer.Option(help="Folder for everything that is made, and for what is needed to continue.")]
    task: TaskSource = "cifar10"
    numbers: Annotated[
        str, typer.Option(help="Reduction numbers, with commas. Default: ten from 0 to the largest possible.")
    ] = ""
    reducer: Annotated[Literal["merging", "pruning"], typer.Option(help="How tokens are reduced.")] = "merging"
    middle: Annotated[
        int | None,
        typer.Option(help="One model serves all numbers up to this one. Default: the number nearest to 20."),
    ] = None
    storage_budget_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes for tuned models, and for soups beside them. Default: no limit.")
    ] = None
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of tuning per number.")] = 30
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per training step.")] = 64
    learning_rate: Annotated[float, typer.Option(help="Learning rate of tuning.")] = 2e-4
    target: Annotated[
        Literal["both", "vanilla", "labels"],
        typer.Option(
            help="What merging models learn: the labels (as in the paper), the vanilla model's answers with all tokens "
            "(no labels are read), or both."
        ),
    ] = "both"
    vanilla_epochs: Annotated[
        int,
        typer.Option(min=0, help="Epochs of learning the task first, with a new head and all tokens. 0: it knows it."),
    ] = 0
    frozen: Annotated[
        str, typer.Option(help="Beginnings of timm's parameter names that are not tuned, with commas.")
    ] = "patch_embed.,pos_embed,cls_token,dist_token,reg_token,norm_pre."
    augment: Annotated[
        bool,
        typer.Option(
            "--augment/--no-augment",
            help="Shift and mirror pictures while learning. Turn it off if positions decide the class.",
        ),
    ] = True
    held: Held = 0.2
    profiling: Annotated[
        Path | None,
        typer.Option(
            help="Labelled pictures to profile on, for a model that was trained on all of --data: pictures that it has "
            "seen flatter it. Default: a share held out from --data."
        ),
    ] = None
    limit: Limit = None
    pixels: Pixels = None
    seed: Seed = 0
    device: Device = "auto"
    threads: Threads = 0
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    merge_order: MergeOrderOption = None


@dataclass(frozen=True)
class DetailOptions:
    """Options of ``isthmus elastic warmup details``."""

    data: Data
    out: Annotated[Path, typer.Option(help="Parquet file to write. The task's JSON file is written beside it.")]
    size_px: Annotated[int, typer.Option(min=8, help="Side of the pictures in pixels.")] = 32
    marks: Annotated[
        int, typer.Option(min=1, max=4, help="Details per picture. There are 2 to the power of this many classes.")
    ] = 3
    side_px: Annotated[int, typer.Option(min=3, help="Side of a detail in pixels.")] = 5
    contrast: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Contrast of a detail. Fainter details are merged away sooner.")
    ] = 0.8
    limit: Annotated[int | None, typer.Option(min=2, help="Use the first so many pictures. Default: all.")] = None
    seed: Seed = 0
    image_column: ImageColumn = None
    label_column: LabelColumn = None
