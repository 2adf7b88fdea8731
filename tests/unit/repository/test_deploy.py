"""The device's systemd unit starts a command that exists, and is shut in."""

import json
import shutil
import subprocess
from pathlib import Path

from tests.rigs.project.system import missing

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
        missing("systemd-analyze is not installed: make system")
    command = [program, "security", "--offline=true", f"--threshold={round(10 * MOST_EXPOSURE)}", "--no-pager", UNIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-400:] + done.stderr
    assert "Overall exposure level" in done.stdout


def test_the_watchdog_is_that_of_a_service_that_reports() -> None:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    assert "Type=notify" in lines, "else WatchdogSec has no meaning"
    (watchdog,) = [int(line.partition("=")[2]) for line in lines if line.startswith("WatchdogSec=")]
    assert watchdog >= 60, "a slow board needs some time to load a student"


def test_systemd_can_read_the_unit(tmp_path: Path) -> None:
    """``verify`` looks for the program and the file of settings, too, so the copy names ones that exist."""
    program = shutil.which("systemd-analyze")
    if program is None:
        missing("systemd-analyze is not installed: make system")
    settings = tmp_path / "device.env"
    settings.write_text("ISTHMUS_CLOUD=cloud.example:443\n")
    text = UNIT.read_text(encoding="utf-8")
    text = text.replace("/opt/isthmus/bin/isthmus", "/bin/true").replace("/etc/isthmus/device.env", str(settings))
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    done = subprocess.run([program, "verify", copy], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert ours == [], "no warning is about this unit"
