"""What deploy/ starts exists: units call the command as it is, and the private authority makes sound certificates."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rigs.project.system import missing

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "cloud").glob("*.service"))
MOST_EXPOSURE = 2.0
FLAGS = json.loads((ROOT / "tests/golden/cli_flags.json").read_text())


def options(unit: Path) -> dict[str, list[str]]:
    """Return the options of a unit's [Service] section by name; lines that end with a backslash go on."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().replace("\\\n", " ").splitlines():
        if "=" in line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_calls_the_command_as_it_is(unit: Path) -> None:
    (command,) = options(unit)["ExecStart"]
    _, *words = shlex.split(command)
    name = f"isthmus {words[0]} {words[1]}"
    known = {each for names in FLAGS[name] for each in names.split(", ")}
    given = {word for word in words if word.startswith("--")}
    assert given and given <= known, given - known
    required = {names for names, default in FLAGS[name].items() if default == "required"}
    assert required <= given
    loaded = {each.partition(":")[0] for each in options(unit).get("LoadCredential", [])}
    assert set(re.findall(r"%d/(\S+)", command)) == loaded, "each credential is used, and none is missing"
    assert f"%S/{options(unit)['StateDirectory'][0]}" in words
    assert options(unit)["User"] == ["isthmus"]


def test_the_readme_names_files_that_exist() -> None:
    for path in re.findall(r"deploy/[\w./@-]+\w", (DEPLOY / "README.md").read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_private_authority_makes_certificates_for_names_and_addresses(tmp_path: Path) -> None:
    script, folder = str(DEPLOY / "private-ca.sh"), tmp_path / "made"

    def made(*names: str) -> bytes:
        subprocess.run([script, str(folder), *names], check=True, capture_output=True)
        verify = ["openssl", "verify", "-CAfile", str(folder / "ca.pem"), "-purpose", "sslserver"]
        for name in names:
            kind = "-verify_hostname" if name[0].isalpha() else "-verify_ip"
            subprocess.run([*verify, kind, name, str(folder / "tls.pem")], check=True, capture_output=True)
        other = subprocess.run(
            [*verify, "-verify_hostname", "other.example", str(folder / "tls.pem")], check=False, capture_output=True
        )
        assert other.returncode != 0
        return (folder / "ca.pem").read_bytes()

    first = made("cloud.example", "192.0.2.10", "2001:db8::1")
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        "ca.pem": "0o644",
        "tls.pem": "0o644",
        "ca.key": "0o600",
        "tls.key": "0o600",
    }
    assert made("localhost") == first, "the authority stays"
    for wrong in ([], ["a,DNS:b"], ["a b"]):
        refused = subprocess.run([script, str(folder), *wrong], check=False, capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_can_read_a_unit_and_finds_it_shut_in(unit: Path, tmp_path: Path) -> None:
    """``verify`` looks for the program too, so the copy names one that exists. A template is read as an instance."""
    program = shutil.which("systemd-analyze")
    if program is None:
        missing("systemd-analyze is not installed: make system")
    copy = tmp_path / unit.name.replace("@.", "@1.")
    copy.write_text(unit.read_text().replace("/opt/isthmus/bin/isthmus", "/bin/true"))
    done = subprocess.run([program, "verify", copy], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if copy.name in line] == [], "no warning is about this unit"
    command = [program, "security", "--offline=true", f"--threshold={round(10 * MOST_EXPOSURE)}", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-400:] + done.stderr
