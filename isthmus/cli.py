"""The one ``isthmus`` command. Subcommands are imported only when they are called, so ``--help`` stays fast."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus import __version__


@dataclass(frozen=True)
class LazyCommand:
    """Where a subcommand lives, and the line ``--help`` shows for it without importing it."""

    module: str
    help: str
    extra: str


SUBCOMMANDS: dict[str, LazyCommand] = {
    "demo": LazyCommand(
        "isthmus.demo.cli", "The whole loop on this machine: two devices, one cloud, a report.", "demo"
    ),
    "data": LazyCommand("isthmus.data.cli", "Check, decode and generate data sets (CREMA-D and AVE layouts).", "train"),
    "distill": LazyCommand("isthmus.distill.cli", "Train the teacher, distil students, export, evaluate.", "train"),
    "cloud": LazyCommand(
        "isthmus.cloud.commands.cloud", "The cloud service: personalise students, answer devices.", "cloud"
    ),
    "edge": LazyCommand("isthmus.edge.commands.edge", "The device: run the agent, see what would leave it.", "edge"),
    "elastic": LazyCommand(
        "isthmus.cloud.commands.elastic",
        "Elastic ViT serving: learn prompts, search schedules, profile a machine.",
        "elastic",
    ),
    "experiment": LazyCommand(
        "isthmus.experiments.cli", "Measured comparisons over seeds, written as result files.", "demo"
    ),
    "privacy": LazyCommand(
        "isthmus.privacy.cli", "Attack what a device would send, and tell what it gives away.", "demo"
    ),
}


def _help() -> str:
    width = max(len(name) for name in SUBCOMMANDS)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "Usage: isthmus [--version] [--help] COMMAND [ARGS]...",
            "",
            "Private, personalised multimodal inference between a device and the cloud.",
            "",
            "Commands:",
            *lines,
            "",
            "'isthmus COMMAND --help' says more of each.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``isthmus`` command: finds the subcommand, imports it, and hands it the rest of the line.

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
        near = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        print(f"isthmus: no command '{name}'.{hint} 'isthmus --help' lists them.", file=sys.stderr)
        return 2
    # Read when torch loads OpenMP. Threads that spin while they wait take the processor from those they wait for: on a
    # machine that did other work too, a training step took up to 13 times as long (docs/results/training-step).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "isthmus":
            raise
        print(
            f"'isthmus {name}' needs the package '{error.name}', which is not installed here. "
            f"Install it with: pip install 'isthmus[{command.extra}]'",
            file=sys.stderr,
        )
        return 1
    module.app(prog_name=f"isthmus {name}", args=rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
