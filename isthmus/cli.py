"""The one ``isthmus`` command. Subcommands are imported only when they are called, so ``--help`` stays fast."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus import __version__

if TYPE_CHECKING:
    from isthmus.command_line import CommandPage


@dataclass(frozen=True)
class LazyCommand:
    """Where a subcommand is defined, and the line that ``--help`` shows for it without importing it."""

    module: str
    help: str
    extra: str


SUBCOMMANDS: dict[str, LazyCommand] = {
    "demo": LazyCommand(
        "isthmus.demo.cli", "Run the whole loop on this machine: two devices, one cloud, a report.", "demo"
    ),
    "data": LazyCommand(
        "isthmus.data.cli", "Check, split and generate data sets in the layouts of CREMA-D and AVE.", "train"
    ),
    "distill": LazyCommand("isthmus.distill.cli", "Train the teacher; distil, export and evaluate students.", "train"),
    "cloud": LazyCommand(
        "isthmus.cloud.commands.cloud", "Run the cloud service: personalise students, answer devices.", "cloud"
    ),
    "edge": LazyCommand(
        "isthmus.edge.commands.edge", "Run the device; show what would leave it; roll a student back.", "edge"
    ),
    "elastic": LazyCommand(
        "isthmus.cloud.commands.elastic",
        "Serve many image tasks with one vision transformer: prepare, measure, query.",
        "elastic",
    ),
    "generate": LazyCommand(
        "isthmus.cloud.commands.generation.commands",
        "Stream replies of a small language model: convert, measure, serve, ask.",
        "generate",
    ),
    "experiment": LazyCommand(
        "isthmus.experiments.cli", "Compare methods over seeds, and write the results to files.", "demo"
    ),
    "link": LazyCommand(
        "isthmus.link.cli", "Pass connections on like a link with faults: slow, stalled, cut, damaged.", "link"
    ),
    "privacy": LazyCommand("isthmus.privacy.cli", "Attack what a device would send, and report what leaks.", "demo"),
}

FIRST_COMMANDS: tuple[tuple[str, str], ...] = (
    ("isthmus demo", "the whole loop on invented clips, in minutes; writes demo-out/report.html"),
    ("isthmus data make crema-d clips", "a small data set of invented clips, to try the other commands on"),
    ("isthmus elastic replay", "how a policy of elastic serving copes with a burst of queries, simulated"),
)
"""What a newcomer types first, and what each command shows."""


def _help() -> str:
    width = max(len(name) for name in SUBCOMMANDS)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in SUBCOMMANDS.items()]
    first = [line for command, shows in FIRST_COMMANDS for line in (f"  {command}", f"      {shows}")]
    return "\n".join(
        [
            "Usage: isthmus [--version] [--help] COMMAND [ARGS]...",
            "",
            "Personalise an audio-visual classifier for each user without uploading recordings.",
            "",
            "Commands:",
            *lines,
            "",
            "First commands to try:",
            *first,
            "",
            "'isthmus COMMAND --help' describes a command and shows an example.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Find the subcommand, import it, and give it the rest of the line. This is the entry point of ``isthmus``.

    The dispatch is plain Python, not a typer group, because a group imports every subcommand to print its help.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("--help", "-h"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"isthmus {__version__}")
        return 0
    name, *rest = args
    command = SUBCOMMANDS.get(name)
    if command is None:
        what = "option" if name.startswith("-") else "command"
        print(
            f"isthmus: no {what} '{name}'.{_did_you_mean(name)} 'isthmus --help' lists the commands.", file=sys.stderr
        )
        return 2
    # Torch reads this when it loads OpenMP. A thread that spins while it waits takes the processor from the thread that
    # it waits for: on a machine with other work, a training step took up to 13 times as long (results: training-step).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "isthmus":
            raise
        print(
            f"isthmus {name}: the package '{error.name}' is not installed here. "
            f"Install it with: pip install 'isthmus[{command.extra}]'",
            file=sys.stderr,
        )
        return 1
    module.app(prog_name=f"isthmus {name}", args=rest)
    return 0


def _did_you_mean(name: str) -> str:
    """Suggest the nearest subcommand, or the command of this name one level deeper, such as 'isthmus cloud serve'."""
    near = difflib.get_close_matches(name, [*SUBCOMMANDS, "--help", "--version"], n=1)
    if near:
        return f" Did you mean '{near[0]}'?"
    deeper = [page.path for page in pages() if not page.below and page.path.rpartition(" ")[2] == name]
    return f" Did you mean {' or '.join(repr(path) for path in deeper)}?" if deeper else ""


def pages() -> list["CommandPage"]:
    """Return the help page of every command, in the order of ``--help``, as plain data. No command is run."""
    from isthmus.command_line import pages_of

    return [
        page
        for name, command in SUBCOMMANDS.items()
        for page in pages_of(importlib.import_module(command.module).app, f"isthmus {name}")
    ]


if __name__ == "__main__":
    sys.exit(main())
