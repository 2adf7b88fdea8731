"""What integration tests share. What needs torch is imported when it is asked for: the device's tests run without."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from isthmus.data.media.encode import write_flv, write_wav
from isthmus.edge.capture.clip_plan import ClipPlan, plan_clips
from tests.rigs.data.clips import EMOTIONS, TAKES

if TYPE_CHECKING:
    from tests.rigs.cloud.service import Rig


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen short synthetic clips in CREMA-D's layout."""
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for folder in ("AudioWAV", "VideoFlash"):
        (root / folder).mkdir()
    for number in range(TAKES):
        for index, emotion in enumerate(EMOTIONS):
            name = f"1001_A{number:02}_{emotion}_XX"
            sound_T = (0.3 * np.sin(np.arange(8_000) * (0.05 + 0.05 * index))).astype(np.float32)
            pictures = rng.integers(0, 255, (6, 32, 32, 3), np.uint8)
            write_wav(root / "AudioWAV" / f"{name}.wav", sound_T, 16_000)
            write_flv(root / "VideoFlash" / f"{name}.flv", pictures, 12, sound_T, 16_000)
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
