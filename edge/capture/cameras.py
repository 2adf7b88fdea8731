"""Cameras: one that OpenCV opens by number, a film that plays as a camera, and a Raspberry Pi's camera module.

Each gives RGB pictures, uint8 (height, width, 3), at most ``WIDEST_PX`` wide. A camera that is gone says so; one that
keeps giving its last picture does not, see ``watch``.
"""

import importlib
import time
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from isthmus.edge.capture.sources import CaptureUnavailable

WIDEST_PX: Final = 480
PICTURES_PER_S: Final = 10.0

Picture = npt.NDArray[np.uint8]


class Camera(Protocol):
    """Opening it raises CaptureUnavailable, which says what a person can do."""

    def read(self) -> Picture:
        """Return the next picture; blocks until there is one. Raises CaptureUnavailable if there is none any more."""

    def close(self) -> None: ...


def open_camera(which: str) -> Camera:
    """Open a camera: a number, "picamera" for a Raspberry Pi's module, or the path of a film that is played again and
    again. Raises CaptureUnavailable.
    """
    if which.isdigit():
        return OpenCVCamera(int(which))
    if which == "picamera":
        return PiCamera()
    return FilmCamera(Path(which))


class OpenCVCamera:
    """Camera ``number`` of this machine."""

    def __init__(self, number: int) -> None:
        import cv2

        self._number = number
        self._device = cv2.VideoCapture(number)
        if not self._device.isOpened():
            self._device.release()
            raise CaptureUnavailable(
                f"camera {number} cannot be opened: is it plugged in, may this user read it, and does no other program "
                "use it?"
            )

    def read(self) -> Picture:
        seen, picture_HWC = self._device.read()
        if not seen:
            raise CaptureUnavailable(f"camera {self._number} gives no pictures any more: is it still plugged in?")
        return _red_first(_narrowed(picture_HWC))

    def close(self) -> None:
        self._device.release()


class FilmCamera:
    """A film at its own speed, from its beginning again after its end."""

    def __init__(self, path: Path) -> None:
        import cv2

        self._path = path
        self._device = cv2.VideoCapture(str(path)) if path.is_file() else None
        if self._device is None or not self._device.isOpened():
            raise CaptureUnavailable(
                f"there is no camera or film {str(path)!r}: give a camera's number, 'picamera', or a film's path"
            )
        self._every_s = 1.0 / min(60.0, max(1.0, self._device.get(cv2.CAP_PROP_FPS) or PICTURES_PER_S))
        self._due_s = time.monotonic()

    def read(self) -> Picture:
        import cv2

        assert self._device is not None
        seen, picture_HWC = self._device.read()
        if not seen:
            self._device.release()
            self._device = cv2.VideoCapture(str(self._path))
            seen, picture_HWC = self._device.read()
        if not seen:
            raise CaptureUnavailable(f"the film {self._path} cannot be read any more")
        self._due_s = max(self._due_s + self._every_s, time.monotonic() - 1.0)
        time.sleep(max(0.0, self._due_s - time.monotonic()))
        return _red_first(_narrowed(picture_HWC))

    def close(self) -> None:
        if self._device is not None:
            self._device.release()


class PiCamera:
    """A Raspberry Pi's camera module, through picamera2. It has run against a fake alone, on no hardware."""

    def __init__(self) -> None:
        try:
            library: Any = importlib.import_module("picamera2")
        except ModuleNotFoundError as error:
            raise CaptureUnavailable(
                "a Raspberry Pi's camera needs the package picamera2 (Raspberry Pi OS: apt install python3-picamera2)"
            ) from error
        try:
            self._device = library.Picamera2()
            try:
                # picamera2 names formats by the order of bits: BGR888 gives bytes in the order red, green, blue.
                self._device.configure(
                    self._device.create_video_configuration(main={"size": (640, 480), "format": "BGR888"})
                )
                self._device.start()
            except BaseException:
                self._device.close()
                raise
        except (RuntimeError, IndexError, OSError) as error:
            raise CaptureUnavailable(f"the camera module cannot be opened: {error}") from error

    def read(self) -> Picture:
        try:
            return _narrowed(self._device.capture_array("main"))
        except (RuntimeError, OSError) as error:
            raise CaptureUnavailable(f"the camera module gives no pictures any more: {error}") from error

    def close(self) -> None:
        self._device.stop()
        self._device.close()


def _red_first(picture_HWC: Picture) -> Picture:
    """Return a picture of OpenCV's, whose channels are blue, green and red, as RGB."""
    import cv2

    return np.asarray(cv2.cvtColor(picture_HWC, cv2.COLOR_BGR2RGB), np.uint8)


def _narrowed(picture_HWC: npt.NDArray[Any]) -> Picture:
    import cv2

    height, width = picture_HWC.shape[:2]
    if width <= WIDEST_PX:
        return np.ascontiguousarray(picture_HWC, np.uint8)
    size = (WIDEST_PX, max(1, round(height * WIDEST_PX / width)))
    return np.asarray(cv2.resize(picture_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)
