"""A tiny release and a real server on it, shared by the tests against hostile callers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rigs.cloud.service import Rig, make_tiny_release


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of an untrained release, see ``make_tiny_release``."""
    root = tmp_path_factory.mktemp("release")
    make_tiny_release(root)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def rig(tiny_release: Path, tmp_path: Path) -> Rig:
    return Rig(tiny_release, tmp_path / "state")
