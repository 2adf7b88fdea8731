"""Every block of code in README.md and docs/ is run or checked; at most one in twenty is neither.

How a block is treated follows from where it is, unless a comment on the line above says otherwise:

- Python is run, all blocks of a page in one namespace (README.md's by tests/unit/repository/test_readme.py);
- shell in docs/tutorials/ is run in order (test_tutorials.py), in one folder for tutorials that build on each other;
- other shell is checked: its commands, options, arguments, extras and make targets exist;
- ``<!-- run -->`` runs a block of shell alone, ``<!-- check: why -->`` only checks it, ``<!-- background: FILE -->``
  runs it until the page ends, once FILE exists, and ``<!-- not run: why -->`` leaves it out.

Results and the log are history: the commands in them are those of their day.
"""

import importlib
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from isthmus.cli import SUBCOMMANDS
from tests.rigs.project.pages import ROOT, Block, blocks, history, pages
from tests.rigs.project.site import reference_pages
from tests.rigs.project.tutorial import environment, run_python, treatment

BLOCKS = [block for page in pages() if not history(page) for block in blocks(page)]
CODE = [block for block in BLOCKS if block.language in ("python", "sh", "console")]
KNOWN_LANGUAGES = {"python", "sh", "console", "text", "json", "toml", "yaml", "{toctree}"}


def test_every_block_names_its_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in KNOWN_LANGUAGES] == []


def test_at_most_one_block_in_twenty_is_not_run() -> None:
    left_out = [block for block in CODE if treatment(block) == "not run"]
    assert len(left_out) <= len(CODE) / 20
    assert all(":" in block.mark for block in left_out), "say why"


@pytest.mark.parametrize("block", [block for block in CODE if treatment(block) == "check"], ids=str)
def test_what_a_block_calls_exists(block: Block) -> None:
    for words in _calls(block.text):
        _check(words)


@pytest.mark.parametrize("block", [block for block in CODE if treatment(block) == "run alone"], ids=str)
def test_a_block_of_shell_runs(block: Block, tmp_path: Path) -> None:
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_python_of_other_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for page in pages():
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(page):
            elsewhere = page.name == "README.md" or "tutorials" in page.parts or history(page)
            if block.language == "python" and treatment(block) == "run" and not elsewhere:
                run_python(block, namespace)
    with pytest.raises(ZeroDivisionError):  # A page may come to have such a block; one that fails is noticed.
        run_python(Block(ROOT / "docs" / "index.md", 1, "python", "1 / 0"), {})


def _calls(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


def _check(words: list[str]) -> None:
    """Fail unless the called program, command and options exist. An unknown program fails too: run it, or mark it."""
    match words:
        case ["isthmus", *rest]:
            _check_isthmus(rest)
        case ["make", *targets]:
            known = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert set(targets) <= set(known)
        case ["pip", "install", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.fullmatch(r"\.\[([\w,]+)\]", what)
            assert asked and set(asked[1].split(",")) <= set(extras)
        case ["pip", "download", "--no-deps", what]:
            assert re.fullmatch(r"[a-z][a-z0-9-]*==[0-9.]+", what), "name the version"
        case ["export", assignment]:
            assert re.match(r"ISTHMUS_\w+=", assignment)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case _:
            pytest.fail(f"nothing is known of {shlex.join(words)}")


def _check_isthmus(rest: list[str]) -> None:
    if rest[0] in ("--help", "--version", "COMMAND"):
        return
    name, *rest = rest
    command: Any = get_command(importlib.import_module(SUBCOMMANDS[name].module).app)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"isthmus {name} has no {rest[0]}"
        command = command.commands[rest.pop(0)]
    if "--help" in rest:
        return
    assert not hasattr(command, "commands"), f"isthmus {name} needs a command"
    options = {spelling: each for each in command.params for spelling in (*each.opts, *each.secondary_opts)}
    given, positional = set(), 0
    while rest:
        word, equals, _ = rest.pop(0).partition("=")
        if not word.startswith("-") or (equals and not word.startswith("--")):
            positional += 1
            continue
        assert word in options, f"{command.name} has no option {word}"
        given.add(options[word].name)
        if not equals and not options[word].is_flag:
            assert rest, f"{word} needs a value"
            rest.pop(0)
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    assert sum(each.required for each in arguments) <= positional <= len(arguments)
    required = {each.name for each in command.params if each.required and each not in arguments}
    assert required <= given, f"{command.name} needs {required - given}"


def test_the_examples_in_the_help_of_commands_exist() -> None:
    """Every ``isthmus`` line of the examples that --help and the reference show."""
    examples = re.findall(r"```sh\n(.*?)```", reference_pages.commands(), flags=re.DOTALL)
    calls = [words for text in examples for words in _calls(text) if words[0] == "isthmus"]
    assert len(calls) >= len(SUBCOMMANDS)
    for words in calls:
        _check(words)


def test_a_wrong_command_is_found() -> None:
    for line in (
        "isthmus data chekc DIR",
        "isthmus data check DIR --strcit",
        "isthmus edge run --state S",
        "make cake",
    ):
        with pytest.raises(AssertionError):
            _check(line.split())
