"""Runs a measuring command of tests/bench in this process: a process of its own would import torch again each time."""

import importlib
import json
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner


def measured(out: Path, name: str, *options: object) -> dict[str, Any]:
    """Run the command as ``python -m tests.bench.<name>`` would. Return the JSON that it writes to the folder ``out``.

    Raises what the command raises.
    """
    command = typer.Typer()
    command.command()(importlib.import_module(f"tests.bench.{name}").main)
    arguments = [*map(str, options), "--out", str(out / "found.json")]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads((out / "found.json").read_text(encoding="utf-8"))
    return found
