"""The built front end in the repository is what its sources give, byte for byte."""

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rigs.project.system import missing

PAGE = Path(__file__).resolve().parents[3] / "isthmus" / "page"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files by name, decompressed: zlib compresses otherwise on another processor."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in found.items()}


def test_the_built_page_is_what_its_sources_give(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("building the page needs Node.js and npm")
    web = tmp_path / "web"
    shutil.copytree(PAGE / "web", web, ignore=shutil.ignore_patterns("node_modules"))
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts"]
    fetched = subprocess.run([npm, "ci", *quiet], cwd=web, capture_output=True, text=True, env=os.environ)
    if fetched.returncode != 0:
        missing(f"the page's tools cannot be installed: {fetched.stderr[-300:]}")
    built = subprocess.run([npm, "run", "build"], cwd=web, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    made, kept = contents(tmp_path / "built"), contents(PAGE / "built")
    assert made == kept, "run 'make page' and commit isthmus/page/built"
