"""The help of every command is quick, loads no heavy library and contains what a new user needs."""

import importlib
import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer

from isthmus import cli
from isthmus.command_line import CommandPage

pytestmark = pytest.mark.timeout(600)

HEAVY = {
    "torch", "torchvision", "timm", "scipy", "sklearn", "matplotlib", "onnx", "onnxruntime", "grpc", "google.protobuf",
    "sqlalchemy", "pandas", "pyarrow", "cv2", "av", "safetensors", "cryptography", "pydantic", "numpy", "rich",
}  # fmt: skip
MOST_CPU_S = 1.0
"""Bound of processor time for a group's help. It takes about 0.25 s, and longer on a busy machine."""

WALK = """
import json, resource, sys
import isthmus.cli

try:
    isthmus.cli.main([sys.argv[1], "--help"])
finally:
    from isthmus.command_line import pages_of
    module = sys.modules[isthmus.cli.SUBCOMMANDS[sys.argv[1]].module]
    pages = pages_of(module.app, f"isthmus {sys.argv[1]}")
    used = resource.getrusage(resource.RUSAGE_SELF)
    facts = {"modules": sorted(sys.modules), "pages": len(pages), "cpu_s": used.ru_utime + used.ru_stime}
    print(json.dumps(facts), file=sys.stderr)
"""


def walk(name: str) -> dict[str, Any]:
    """Render the help of a subcommand and of everything below it in a process of its own."""
    done = subprocess.run([sys.executable, "-c", WALK, name], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"Usage: isthmus {name}")
    found: dict[str, Any] = json.loads(done.stderr)
    return found


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_help_is_quick_and_imports_nothing_heavy(name: str) -> None:
    found = walk(name)
    assert HEAVY.isdisjoint(found["modules"])
    assert found["pages"] >= 1
    cpu_s = found["cpu_s"]
    for _ in range(2):
        if cpu_s > MOST_CPU_S:
            cpu_s = min(cpu_s, walk(name)["cpu_s"])
    assert cpu_s <= MOST_CPU_S


@pytest.fixture(scope="module")
def pages() -> list[CommandPage]:
    return cli.pages()


def test_every_subcommand_has_pages(pages: list[CommandPage]) -> None:
    paths = [page.path for page in pages]
    assert len(paths) == len(set(paths)) >= 46
    assert {path.split()[1] for path in paths} == set(cli.SUBCOMMANDS)
    assert all(below in paths for page in pages for below in page.below)


def test_every_page_teaches(pages: list[CommandPage]) -> None:
    for page in pages:
        assert page.summary.endswith("."), page.path
        assert "--help" in page.text, page.path
        if page.below:
            assert "..." not in page.text.partition("Commands:")[2], f"{page.path} cuts a command's summary off"
            continue
        assert page.help.count("\n\n") >= 1, f"{page.path}: only a summary"
        assert "Needs " in page.help, f"{page.path} does not say what it needs"
        assert any(word in page.help for word in ("Write", "write", "Print", "print", "List", "keeps")), page.path
        assert page.example.startswith(f"{page.path} ") or page.example.startswith(page.path), page.path


def test_every_option_is_explained(pages: list[CommandPage]) -> None:
    for page in pages:
        for option in page.options:
            assert option.help.endswith((".", ")")), f"{page.path} {option.names}: {option.help!r}"


def _command(path: str) -> tuple[Any, list[str]]:
    """Find the command that a line calls, and its arguments."""
    _, name, *rest = shlex.split(path.replace("\\\n", " "))
    command: Any = typer.main.get_command(importlib.import_module(cli.SUBCOMMANDS[name].module).app)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    return command, rest


def test_every_example_parses(pages: list[CommandPage]) -> None:
    for page in pages:
        lines = page.example.replace("\\\n", " ").splitlines()
        assert bool(lines) != bool(page.below), page.path
        for line in lines:
            command, arguments = _command(line)
            context = command.make_context("example", [*arguments], resilient_parsing=True)
            for each in command.params:
                given = each.param_type_name == "argument" or set(each.opts) & set(arguments)
                assert given or not each.required, f"{line} lacks {each.opts}"
            assert not context.args, f"{line} has words left over"


def test_the_first_commands_of_a_newcomer_parse() -> None:
    for line, shows in cli.FIRST_COMMANDS:
        command, arguments = _command(line)
        assert command.make_context("first", arguments, resilient_parsing=True)
        assert shows


def test_pages_are_plain_data(pages: list[CommandPage]) -> None:
    check = next(page for page in pages if page.path == "isthmus data check")
    by_name = {option.names[0]: option for option in check.options}
    assert check.usage.startswith("isthmus data check [OPTIONS]")
    assert by_name["folder"].argument and by_name["folder"].required
    assert by_name["--layout"].default == "auto" and "crema-d" in by_name["--layout"].value
    assert by_name["--decode"].names == ("--decode", "--no-decode") and by_name["--decode"].default == "--decode"
    serve = next(page for page in pages if page.path == "isthmus cloud serve")
    assert {option.environment for option in serve.options} == {
        f"ISTHMUS_CLOUD_{option.names[0].removeprefix('--').replace('-', '_').upper()}" for option in serve.options
    }


def test_a_client_of_elastic_serving_needs_no_torch() -> None:
    """With every library of learning and of the server blocked, the client still reaches for the server."""
    blocked = ["torch", "torchvision", "timm", "scipy", "sklearn", "sqlalchemy", "cv2", "av", "pyarrow", "alembic"]
    code = (
        f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n"
        "import isthmus.cli\nisthmus.cli.main(sys.argv[1:])"
    )
    server = ["--server", "127.0.0.1:1"]
    for arguments in (["tasks"], ["remove", "animals"], ["query", "animals", __file__]):
        done = subprocess.run(
            [sys.executable, "-c", code, "elastic", *arguments, *server], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"isthmus elastic {arguments[0]}: ")
        assert len(done.stderr.splitlines()) == 1


def test_a_simulated_replay_needs_no_torch() -> None:
    code = "import sys\nsys.modules['torch'] = None\nimport isthmus.cli\nisthmus.cli.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "elastic", "replay", "--duration-s", "1"], capture_output=True, text=True
    )
    assert (done.returncode, "no policy passes" in done.stdout) == (0, True), done.stderr


def test_checking_ten_clips_takes_under_a_second(tmp_path: Any) -> None:
    from isthmus.data.synthetic.sets import make_crema_d

    make_crema_d(tmp_path / "clips", actors=2, takes=1, seed=0, difficulty=0.3)
    code = (
        "import resource, sys, isthmus.cli\n"
        "try:\n    isthmus.cli.main(['data', 'check', sys.argv[1]])\n"
        "finally:\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(used.ru_utime + used.ru_stime, 'scipy' in sys.modules, 'torch' in sys.modules, file=sys.stderr)"
    )
    took_s = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "clips")], capture_output=True, text=True, timeout=120
        )
        assert "12 clips decode, 0 damaged" in done.stdout
        cpu_s, *heavy = done.stderr.split()
        assert heavy == ["False", "False"]
        took_s.append(float(cpu_s))
        if took_s[-1] < 1.0:
            break
    assert min(took_s) < 2.0  # about 0.6 s of processor time; a busy machine adds to it
