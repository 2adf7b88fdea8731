"""The `isthmus` command: help without torch, one clear line for a wrong name or a missing package."""

import os
import subprocess
import sys

import pytest

from isthmus import __version__, cli

HEAVY = ("torch", "onnxruntime", "grpc", "sklearn", "scipy", "cv2", "av", "numpy", "typer")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)


def test_help_imports_nothing_heavy() -> None:
    result = _run(
        "import sys, isthmus.cli\n"
        "assert isthmus.cli.main(['--help']) == 0\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded: []"


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.SUBCOMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"isthmus {__version__}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("egde", "edge"),
        ("--hepl", "--help"),
        ("serve", "isthmus cloud serve' or 'isthmus generate serve"),
        ("distil", "distill"),
    ],
)
def test_a_wrong_name_gets_the_near_one(capsys: pytest.CaptureFixture[str], typed: str, meant: str) -> None:
    assert cli.main([typed]) == 2
    shown = capsys.readouterr().err
    assert f"Did you mean '{meant}'?" in shown
    assert len(shown.splitlines()) == 1


def test_a_name_that_resembles_none_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyzzy"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_help_shows_the_first_three_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert len(cli.FIRST_COMMANDS) == 3
    assert all(f"  {command}\n" in shown for command, _ in cli.FIRST_COMMANDS)


@pytest.mark.parametrize(("said", "waiting"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(said: dict[str, str], waiting: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = (
        "import os, contextlib, isthmus.cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    isthmus.cli.main(['data', '--help'])\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **said}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == waiting


def test_a_missing_package_is_one_line_with_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = cli.LazyCommand("no_such_package_of_ours.cli", "help", "edge")
    monkeypatch.setitem(cli.SUBCOMMANDS, "absent", absent)
    assert cli.main(["absent"]) == 1
    message = capsys.readouterr().err
    assert "pip install 'isthmus[edge]'" in message
    assert len(message.splitlines()) == 1
