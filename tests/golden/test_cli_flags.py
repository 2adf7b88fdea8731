"""The command line is an interface: scripts depend on it. A new, missing or changed flag fails this test.

If the change is intended, ``python -m tests.golden.test_cli_flags`` writes the file again. Add it to CHANGELOG.md.
"""

import importlib
import json
import platform
from pathlib import Path
from typing import Any

import typer

from isthmus.cli import SUBCOMMANDS

FROZEN = Path(__file__).with_name("cli_flags.json")


def flags() -> dict[str, dict[str, str]]:
    """Return each command's parameters, with "required" or else their default."""
    found: dict[str, dict[str, str]] = {}
    for name, lazy in sorted(SUBCOMMANDS.items()):
        _collect(f"isthmus {name}", typer.main.get_command(importlib.import_module(lazy.module).app), found)
    return found


def _collect(name: str, command: Any, found: dict[str, dict[str, str]]) -> None:
    for below, child in sorted(getattr(command, "commands", {}).items()):
        _collect(f"{name} {below}", child, found)
    if not hasattr(command, "commands"):
        found[name] = {
            ", ".join([*parameter.opts, *parameter.secondary_opts]): (
                "required" if parameter.required else _default(parameter.default)
            )
            for parameter in command.params
        }


def _default(default: Any) -> str:
    return "<this machine's name>" if default == platform.node() else str(default)


def test_no_flag_changed_unseen() -> None:
    assert flags() == json.loads(FROZEN.read_text())


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(flags(), indent=1) + "\n")
