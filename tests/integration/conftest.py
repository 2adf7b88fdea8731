"""What integration tests share. What needs torch is imported when it is asked for: the device's tests run without."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from isthmus.edge.capture.clip_plan import ClipPlan, plan_clips
from tests.rigs.data.clips import write_tiny_clips

if TYPE_CHECKING:
    from tests.rigs.cloud.service import Rig


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen short synthetic clips in CREMA-D's layout."""
    root = tmp_path_factory.mktemp("clips")
    write_tiny_clips(root)
    return root


@pytest.fixture
def plan(clips: Path) -> ClipPlan:
    return plan_clips(clips, seed=1)


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an untrained release, see ``make_tiny_release``."""
    from tests.rigs.cloud.service import make_tiny_release

    root = tmp_path_factory.mktemp("release")
    make_tiny_release(root)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def rig(tiny_release: Path, tmp_path: Path) -> "Rig":
    from tests.rigs.cloud.service import Rig

    return Rig(tiny_release, tmp_path / "state")
