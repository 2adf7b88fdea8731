"""Options of the commands of ``isthmus generate``. Free of torch, so that help is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from isthmus.cloud.generation.serve.settings import GenerationSettings, KVTokens, Layout, NumberType, Rows
from isthmus.command_line import Seed

ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL_DIR",
        help="Model directory as Hugging Face publishes them (config.json, safetensors, tokenizer.json), or one that "
        "'isthmus generate convert' wrote.",
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        help="Scheduling policy: fused, static, orca, baton, sjf, srpt, hrrn, vtc, paced, jitserve or magnus."
    ),
]


@dataclass(frozen=True)
class ConvertOptions:
    """Options of ``isthmus generate convert``."""

    source: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF file.")]
    out: Annotated[Path, typer.Option(help="Model directory to write. It must not exist.")]
    number_type: NumberType = "float32"


@dataclass(frozen=True)
class GenerateProfileOptions:
    """Options of ``isthmus generate profile``."""

    model: ModelFolder
    out: Annotated[Path, typer.Option(help="JSON file to write.")]
    number_type: NumberType = "float32"
    layout: Layout = "slots"
    device: Annotated[str, typer.Option(help="Where the model runs: cpu or cuda.")] = "cpu"
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1
    repeats: Annotated[int, typer.Option(min=1, help="Number of times that each kind of step is timed.")] = 3


@dataclass(frozen=True)
class GenerateServeOptions(GenerationSettings):
    """Options of ``isthmus generate serve``: the settings of generation, and where it listens."""

    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL_DIR]",
            help="Model directory as Hugging Face publishes them (config.json, safetensors, tokenizer.json), or one "
            "that 'isthmus generate convert' wrote. Not with --generate-upstream.",
        ),
    ] = None
    http: Annotated[
        str,
        typer.Option(
            help="HOST:PORT to listen on. Port 0 chooses a free port. Beyond loopback key and TLS are needed."
        ),
    ] = "127.0.0.1:8000"
    port_file: Annotated[Path | None, typer.Option(help="File to write HOST:PORT to once the server is ready.")] = None
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file with the certificate chain. Needs --tls-key.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with the private key. Needs --tls-cert.")] = None


@dataclass(frozen=True)
class AskOptions:
    """Options of ``isthmus generate ask``."""

    prompt: Annotated[str, typer.Argument(help="What to say to the model.")]
    server: Annotated[
        str, typer.Option(help="Address of the server, such as http://127.0.0.1:8000 (https:// with TLS).")
    ] = "http://127.0.0.1:8000"
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the most likely token each time.")] = 0.7
    seed: Annotated[int | None, typer.Option(help="Seed of the draws. Default: another one each time.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Text at which the answer ends. May be repeated.")] = None
    latency_s: Annotated[float | None, typer.Option(help="Seconds within which the whole answer should be there.")] = (
        None
    )
    key_file: Annotated[Path | None, typer.Option(help="File with the API key that the server asks for.")] = None
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate to trust, for https://.")] = None


@dataclass(frozen=True)
class GenerateReplayOptions:
    """Options of ``isthmus generate replay``."""

    workload: Annotated[
        str,
        typer.Argument(
            help="lmaas (six applications), chat (conversations), or a CSV file of the Azure LLM inference traces."
        ),
    ] = "lmaas"
    policy: Policy = "fused"
    load: Annotated[
        float, typer.Option(min=0.01, help="Work that arrives, as a multiple of what the machine does with 32 rows.")
    ] = 0.9
    seed: Seed = 0
    seeds: Annotated[
        int,
        typer.Option(min=1, max=1_000, help="Simulate so many seeds from --seed on, and print medians and spreads."),
    ] = 1
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="Number of requests.")] = 400
    profile: Annotated[
        Path | None, typer.Option(help="Profile that 'isthmus generate profile' wrote. Default: a measured Xeon's.")
    ] = None
    rows: Rows = 32
    kv_tokens: KVTokens = 16_000
    lengths: Annotated[
        Literal["learned", "warm", "known"],
        typer.Option(
            help="What policies know of the lengths of answers: learned from those that ended, the same with 500 of an "
            "earlier day, or all."
        ),
    ] = "learned"
    evict: Annotated[
        bool, typer.Option("--evict", help="Evict requests that can no longer be in time before they begin.")
    ] = False
    heavy: Annotated[
        float | None,
        typer.Option(min=0.2, max=0.99, help="One of five users sends this share of the requests. Default: one user."),
    ] = None
    bursty: Annotated[
        bool, typer.Option("--bursty", help="Arrivals with three times the spread of a Poisson process.")
    ] = False
    shrink: Annotated[float, typer.Option(min=1.0, help="Divide the prompts of a recorded trace by this.")] = 8.0
    out: Annotated[Path | None, typer.Option(help="JSON file to write all figures to.")] = None


@dataclass(frozen=True)
class PlaceOptions:
    """Options of ``isthmus generate place``."""

    workload: Annotated[
        str,
        typer.Argument(
            help="lmaas (six applications), chat (conversations), or a CSV file of the Azure LLM inference traces."
        ),
    ] = "chat"
    replicas: Annotated[int, typer.Option(min=1, max=16, help="Number of replicas.")] = 2
    ttft_s: Annotated[float, typer.Option(min=0.001, help="Seconds within which the first token must be there.")] = 1.0
    tpot_s: Annotated[float, typer.Option(min=0.001, help="Mean seconds that a further token may take.")] = 0.1
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the requests that must be in time.")] = 0.9
    requests: Annotated[int, typer.Option(min=10, max=100_000, help="Number of requests of each simulation.")] = 300
    seed: Seed = 0
    profile: Annotated[
        Path | None, typer.Option(help="Profile that 'isthmus generate profile' wrote. Default: a measured Xeon's.")
    ] = None
    rows: Rows = 32
    kv_tokens: KVTokens = 16_000
    shrink: Annotated[float, typer.Option(min=1.0, help="Divide the prompts of a recorded trace by this.")] = 8.0
    out: Annotated[Path | None, typer.Option(help="JSON file to write all rates to.")] = None
