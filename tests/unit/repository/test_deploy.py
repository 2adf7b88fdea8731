"""The device's systemd unit starts a command that exists, and is shut in."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
UNIT = ROOT / "deploy" / "device" / "isthmus-device.service"
MOST_EXPOSURE = 2.0


def test_the_unit_starts_a_command_with_flags_that_exist() -> None:
    (line,) = [line for line in UNIT.read_text(encoding="utf-8").splitlines() if line.startswith("ExecStart=")]
    flags = json.loads((ROOT / "tests" / "golden" / "cli_flags.json").read_text(encoding="utf-8"))["isthmus edge run"]
    program, *words = line.removeprefix("ExecStart=").split()
    assert (Path(program).name, words[:2]) == ("isthmus", ["edge", "run"])
    given = {word for word in words if word.startswith("--")}
    assert given <= set(flags)
    assert {name for name, default in flags.items() if default == "required"} <= given


def test_the_unit_is_shut_in() -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        assert "ISTHMUS_REQUIRE_SYSTEM" not in os.environ, "systemd-analyze is missing (Debian: apt install systemd)"
        pytest.skip("systemd-analyze is not installed (Debian: apt install systemd)")
    command = [program, "security", "--offline=true", f"--threshold={round(10 * MOST_EXPOSURE)}", "--no-pager", UNIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-400:] + done.stderr
    assert "Overall exposure level" in done.stdout
