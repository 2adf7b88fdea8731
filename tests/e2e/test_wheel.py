"""The wheel holds every module and every data file of the checkout, and works without it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("edge", "proto", "data", "distill", "cloud")
DATA_ENDINGS = {".typed", ".proto", ".pyi", ".html", ".json", ".ini", ".mako"}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def _sources(folder: Path, prefix: str) -> set[str]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and (path.suffix in {".py", *DATA_ENDINGS} or path.name == "py.typed")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build in the checkout gets in."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("isthmus", *ROOMS):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, copy],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (file,) = out.glob("isthmus-*.whl")
    return file


def test_the_wheel_holds_all_of_the_checkout_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = _sources(ROOT / "isthmus", "isthmus")
    for room in ROOMS:
        expected |= _sources(ROOT / room, f"isthmus/{room}")
    assert held == expected


def test_the_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], check=True
    )
    code = (
        "import importlib.resources as r, isthmus, isthmus.cli, isthmus.edge, isthmus.proto.v1.isthmus_pb2 as pb\n"
        "import pathlib, sys\n"
        "site = pathlib.Path(sys.argv[1])\n"
        "for module in (isthmus, isthmus.edge, pb):\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__\n"
        "assert list(isthmus.__path__) == [str(site / 'isthmus')]\n"
        "assert '<html' in (r.files('isthmus.demo') / 'report.html').read_text()\n"
        "sys.exit(isthmus.cli.main(['--version']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, site],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("isthmus ")
