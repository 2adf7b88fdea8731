"""One suite for every camera: a film, OpenCV's and a Raspberry Pi's.

OpenCV's camera number 3 is a film that OpenCV itself decodes. The Raspberry Pi's library is a fake: no camera module
was ever tried.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isthmus.data.media.encode import write_mp4
from isthmus.edge.capture.cameras import WIDEST_PX, Camera, open_camera
from isthmus.edge.capture.sources import CaptureUnavailable

RED = np.zeros((48, 640, 3), np.uint8)
RED[:, :, 0] = 200
"""Each camera shows this picture: red, and wider than what is kept."""

Unplug = Callable[[], None]


def film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Unplug]:
    path = tmp_path / "red.mp4"
    write_mp4(path, np.stack([RED] * 5), 30, np.zeros(8_000, np.float32), 16_000)
    return str(path), path.unlink


def by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Unplug]:
    import cv2

    path = tmp_path / "camera-3.mp4"
    write_mp4(path, np.stack([RED] * 12), 30, np.zeros(8_000, np.float32), 16_000)
    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: opened(str(path) if source == 3 else source))
    return "3", path.unlink


def raspberry_pi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Unplug]:
    state = {"plugged": True}

    class Picamera2:
        def __init__(self) -> None:
            if not state["plugged"]:
                raise IndexError("list index out of range")

        def create_video_configuration(self, main: dict[str, Any]) -> dict[str, Any]:
            assert main["format"] == "BGR888"  # which is red, green, blue in memory
            return main

        def configure(self, configuration: dict[str, Any]) -> None:
            self.size = configuration["size"]

        def start(self) -> None: ...
        def stop(self) -> None: ...
        def close(self) -> None: ...

        def capture_array(self, stream: str) -> np.ndarray:
            if not state["plugged"]:
                raise RuntimeError("Camera frontend has timed out!")
            return RED

    monkeypatch.setitem(sys.modules, "picamera2", SimpleNamespace(Picamera2=Picamera2))
    return "picamera", lambda: state.update(plugged=False)


@pytest.fixture(params=[film, by_number, raspberry_pi], ids=lambda make: make.__name__)
def plugged(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Unplug]:
    made: tuple[str, Unplug] = request.param(tmp_path, monkeypatch)
    return made


def test_pictures_are_rgb_and_not_too_wide(plugged: tuple[str, Unplug]) -> None:
    camera: Camera = open_camera(plugged[0])
    picture = camera.read()
    assert picture.dtype == np.uint8 and picture.shape == (36, WIDEST_PX, 3)
    red, green, blue = picture.reshape(-1, 3).mean(axis=0)
    assert red > 150 and green < 60 and blue < 60
    assert picture.flags["C_CONTIGUOUS"]
    camera.close()


def test_pictures_go_on(plugged: tuple[str, Unplug]) -> None:
    camera = open_camera(plugged[0])
    assert all(camera.read().shape[2] == 3 for _ in range(8)), "a film of 5 pictures begins again"
    camera.close()


def test_a_camera_that_is_pulled_out_says_so(plugged: tuple[str, Unplug]) -> None:
    which, unplug = plugged
    camera = open_camera(which)
    camera.read()
    unplug()
    with pytest.raises(CaptureUnavailable, match="any more"):
        for _ in range(20):
            camera.read()
    camera.close()


def test_a_camera_that_is_not_there_says_what_to_do(plugged: tuple[str, Unplug]) -> None:
    which, unplug = plugged
    unplug()
    with pytest.raises(CaptureUnavailable):
        open_camera(which)


def test_without_picamera2_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "picamera2", None)
    with pytest.raises(CaptureUnavailable, match="python3-picamera2"):
        open_camera("picamera")


def test_a_camera_module_that_does_not_start_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next try would find it in use."""
    closed: list[bool] = []

    class Picamera2:
        def create_video_configuration(self, main: dict[str, Any]) -> dict[str, Any]:
            return main

        def configure(self, configuration: dict[str, Any]) -> None: ...

        def start(self) -> None:
            raise RuntimeError("Camera __init__ sequence did not complete.")

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setitem(sys.modules, "picamera2", SimpleNamespace(Picamera2=Picamera2))
    with pytest.raises(CaptureUnavailable, match="camera module cannot be opened"):
        open_camera("picamera")
    assert closed == [True]
