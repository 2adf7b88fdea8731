"""The wheel holds every module and every data file of the checkout, and works without it; builds are reproducible."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INCLUDED = (
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "Makefile",
    "constraints.txt",
    "buf.yaml",
)
ROOMS = ("edge", "proto", "data", "distill", "cloud")
DATA_ENDINGS = {".typed", ".proto", ".pyi", ".html", ".json", ".ini", ".mako"}

pytestmark = pytest.mark.e2e


def _sources(folder: Path, prefix: str) -> set[str]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not path.is_relative_to(ROOT / "isthmus/page/web")
        and (
            path.is_relative_to(ROOT / "isthmus/page/built")
            or path.suffix in {".py", *DATA_ENDINGS}
            or path.name == "py.typed"
        )
    }


def _copy(to: Path) -> Path:
    """Copy what the repository holds, so that nothing of an earlier build in the checkout gets in."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", *INCLUDED):
        shutil.copy(ROOT / name, to)
    for name in ("isthmus", "tests", "docs", "examples", "deploy", *ROOMS):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    return to


def _build(kind: str, source: Path, out: Path) -> Path:
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(out)!r}))"
    built = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return out / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, built from a copy of the checkout."""
    return _build("sdist", _copy(tmp_path_factory.mktemp("checkout")), tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source archive, as an installation from a package index builds it."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return _build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_source_archive_holds_what_is_needed_to_build_and_test(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
        members = tar.getmembers()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    wanted = {
        name
        for name in tracked.stdout.splitlines()
        if not name.startswith((".typing/", ".ci/", ".github/", ".gitignore", ".pre-commit", ".dockerignore"))
        and (ROOT / name).exists()
    }
    assert sorted(wanted - held) == []
    assert {(each.uid, each.gid, each.uname, each.gname, each.mtime) for each in members} == {(0, 0, "", "", 1.7e9)}
    assert {each.mode for each in members} <= {0o644, 0o755}


def test_another_copy_of_the_checkout_gives_the_same_bytes(archive: Path, wheel: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    _copy(copy)
    for path in copy.rglob("*.md"):
        path.chmod(0o600)
        os.utime(path, (0, 0))
    again = _build("sdist", copy, tmp_path)
    assert again.read_bytes() == archive.read_bytes()
    assert _build("wheel", copy, tmp_path).read_bytes() == wheel.read_bytes()


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
