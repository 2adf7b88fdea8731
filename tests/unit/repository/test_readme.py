"""README.md is correct: its Python runs; its make targets, commands, options and links exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from isthmus.cli import SUBCOMMANDS

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _commands() -> list[list[str]]:
    """Return the words of every ``isthmus ...`` command in inline code and in blocks, without comments."""
    lines = [line.partition("#")[0] for block in _blocks("sh") for line in block.splitlines()]
    inline = re.findall(r"`(isthmus [^`]*)`", README)
    return [line.split() for line in [*lines, *inline] if line.startswith("isthmus ")]


def test_the_python_of_the_readme_runs() -> None:
    (code,) = _blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    claimed = set(re.findall(r"(?:^|`|> )make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "lint", "bench"} <= claimed
    assert claimed <= targets


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    _, name, *rest = words
    if name == "COMMAND":
        return
    assert name in SUBCOMMANDS
    app: typer.Typer = importlib.import_module(SUBCOMMANDS[name].module).app
    command = get_command(app)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"isthmus {name} has no {rest[0]}"
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http:", "https:"))]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing
