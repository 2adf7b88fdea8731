"""Every library of the device has a wheel for 64-bit ARM and Python 3.11, as Raspberry Pi OS has them.

pip resolves for that machine and downloads nothing. It needs a package index; without one the test is skipped.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Debian 12, which Raspberry Pi OS is made of, has glibc 2.36.
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")
UNREACHABLE = ("connection", "temporary failure", "timed out", "name resolution", "proxy")


def test_the_device_installs_on_64_bit_arm_without_a_compiler(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["edge"], *extras["live"]]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--no-input"]
    command += [
        "--retries",
        "1",
        "--timeout",
        "15",
        "--disable-pip-version-check",
        "--report",
        str(tmp_path / "report"),
    ]
    command += ["--only-binary", ":all:", "--python-version", "3.11", "--target", str(tmp_path / "nothing")]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command += ["-c", str(ROOT / "constraints.txt"), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode and any(word in done.stderr.lower() for word in UNREACHABLE):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[0][:120]}")
    assert done.returncode == 0, f"to be built by hand on the board: {done.stderr[-800:]}"
    report = json.loads((tmp_path / "report").read_text(encoding="utf-8"))
    files = [each["download_info"]["url"].rpartition("/")[2] for each in report["install"]]
    names = {each["metadata"]["name"].lower().replace("_", "-") for each in report["install"]}
    assert {"onnxruntime", "opencv-python-headless", "av", "grpcio", "pynacl", "sounddevice"} <= names
    assert "torch" not in names
    compiled = [name for name in files if not name.endswith("-any.whl")]
    assert compiled and all("aarch64" in name for name in compiled), compiled
