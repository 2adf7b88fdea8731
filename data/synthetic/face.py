"""Synthetic faces: drawn heads whose brows, eyes and mouth express an emotion. They are not photographs.

K frames, H W pixels, C channels (RGB).
"""

from dataclasses import dataclass, replace
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

PX: Final = 160
FPS: Final = 12

CUES: Final = ("brow_raise", "brow_furrow", "eye_open", "mouth_curve", "mouth_open", "mouth_width")
"""The features that express an emotion, each around -1..1, and 0 for a face at rest."""

_SKINS: Final = ((245, 214, 190), (225, 180, 150), (198, 145, 110), (150, 100, 70), (105, 68, 48))
_SHIFT: Final = 4
"""Fractional bits of the drawing coordinates: motion is finer than a pixel."""


@dataclass(frozen=True)
class Face:
    """The features of an actor that stay the same in every picture."""

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    backdrop: tuple[int, int, int]
    head_width: float
    head_height: float
    eye_gap: float
    eye_size: float
    brow_width: float
    mouth_drop: float
    light: tuple[float, float, float]
    """Brightness, and its slope to the right and downwards."""

    @staticmethod
    def draw(rng: np.random.Generator) -> "Face":
        skin = np.array(_SKINS[rng.integers(len(_SKINS))]) + rng.integers(-12, 13, 3)
        return Face(
            skin=_colour(skin),
            hair=_colour(rng.integers(15, 150) * np.array([1.2, 0.85, 0.6])),
            backdrop=_colour(rng.integers(60, 220, 3)),
            head_width=float(rng.uniform(36, 45)),
            head_height=float(rng.uniform(50, 60)),
            eye_gap=float(rng.uniform(14, 19)),
            eye_size=float(rng.uniform(6, 9)),
            brow_width=float(rng.uniform(2.0, 4.5)),
            mouth_drop=float(rng.uniform(24, 30)),
            light=(float(rng.uniform(0.65, 1.15)), float(rng.uniform(-0.3, 0.3)), float(rng.uniform(-0.25, 0.25))),
        )

    def spread(self, factor: float) -> "Face":
        """Return this face with its measures and light moved away from the average ones, or towards them: their
        difference times ``factor``. Colours stay.
        """
        if factor == 1:
            return self
        moved = {name: middle + factor * (getattr(self, name) - middle) for name, middle in _MIDDLE.items()}
        level, right, down = self.light
        light = (_MIDDLE_LEVEL + factor * (level - _MIDDLE_LEVEL), factor * right, factor * down)
        return replace(self, **moved, light=light)


_MIDDLE: Final = {
    "head_width": 40.5,
    "head_height": 55.0,
    "eye_gap": 16.5,
    "eye_size": 7.5,
    "brow_width": 3.25,
    "mouth_drop": 27.0,
}
_MIDDLE_LEVEL: Final = 0.9
"""The middle of every range that ``Face.draw`` draws from; that of the light's slopes is 0."""


def film(
    face: Face,
    cues_V: npt.NDArray[np.float64],
    loudness_K: npt.NDArray[np.float64],
    rng: np.random.Generator,
    *,
    grain: float,
    unrest: float,
) -> npt.NDArray[np.uint8]:
    """Return a talking head: uint8 (K, PX, PX, 3), one frame per entry of ``loudness_K`` (0..1), which moves the lips.

    The expression appears over the first frames and stays; the head sways. ``grain`` is the deviation of the camera's
    noise in grey levels; ``unrest`` (0..1) is how freely head and camera move.
    """
    count = len(loudness_K)
    onset_K = np.clip(0.45 + np.arange(count) / max(1, count) * 1.6, 0.0, 1.0)
    phase = rng.uniform(0, 2 * np.pi, 3)
    sway_K = np.linspace(0, 2 * np.pi * rng.uniform(0.5, 1.2), count)
    blink = int(rng.integers(count))
    grain_HWC = rng.normal(0.0, grain, (PX + 32, PX + 32, 3)).astype(np.float32)
    light_HW1 = _light(face)
    size, tilt = 1.12 + (0.02 + 0.1 * unrest) * rng.uniform(-1, 1), (1.0 + 4.0 * unrest) * rng.normal()
    reach = 1.0 + 4.0 * unrest
    place = reach * rng.normal(size=2)
    frames: list[npt.NDArray[np.uint8]] = []
    for position in range(count):
        cues = np.clip(cues_V * onset_K[position], -1.6, 1.6)
        canvas = _draw(face, cues, float(loudness_K[position]), closed=position == blink)
        angle = tilt + reach * np.sin(sway_K[position] + phase[0])
        matrix = cv2.getRotationMatrix2D((PX / 2, PX / 2), float(angle), float(size))
        matrix[:, 2] += place + reach * np.sin(sway_K[position] + phase[1:])
        moved = cv2.warpAffine(canvas, matrix, (PX, PX), borderMode=cv2.BORDER_REPLICATE)
        top, left = rng.integers(32, size=2)
        lit = moved * light_HW1 + grain_HWC[top : top + PX, left : left + PX]
        frames.append(np.clip(lit, 0, 255).astype(np.uint8))
    return np.stack(frames)


def _draw(face: Face, cues_V: npt.NDArray[np.float64], loudness: float, *, closed: bool) -> npt.NDArray[np.uint8]:
    brow_raise, brow_furrow, eye_open, mouth_curve, mouth_open, mouth_width = (float(cue) for cue in cues_V)
    canvas = np.full((PX, PX, 3), face.backdrop, np.uint8)
    x, y = PX / 2, PX / 2 + 4
    dark = _colour(np.array(face.skin) * 0.55)
    _ellipse(canvas, (x, y - 10), (face.head_width + 6, face.head_height + 2), face.hair)
    _ellipse(canvas, (x, y + 62), (58, 26), _colour(255 - np.array(face.backdrop)))
    _ellipse(canvas, (x, y), (face.head_width, face.head_height), face.skin)
    _ellipse(canvas, (x, y - face.head_height + 8), (face.head_width - 4, 13), face.hair)

    eye_y = y - 11
    opening = 0.6 if closed else max(0.6, face.eye_size * (0.6 + 0.4 * eye_open))
    for side in (-1, 1):
        centre = (x + side * face.eye_gap, eye_y)
        _ellipse(canvas, centre, (face.eye_size, opening), (245, 245, 245))
        if not closed:
            _ellipse(canvas, centre, (min(3.6, opening), min(3.6, opening)), (40, 30, 25))
        brow_y = eye_y - 11 - 6.0 * brow_raise
        inner = (x + side * (face.eye_gap - 8 - 1.5 * brow_furrow), brow_y + 6.5 * brow_furrow)
        outer = (x + side * (face.eye_gap + 9), brow_y - 1.5 * brow_furrow + 1)
        _line(canvas, [inner, outer], face.hair, face.brow_width)
    _line(canvas, [(x, y - 4), (x - 4, y + 11), (x + 3, y + 11)], dark, 1.4)

    half = 14 + 5.0 * mouth_width
    gap = max(0.8, 2.5 + 4.0 * mouth_open + 2.5 * loudness)
    across = np.linspace(-1, 1, 13)
    corners = 10.0 * mouth_curve * (0.4 - across**2)  # y grows downwards: raised corners smile
    mouth_y = y + face.mouth_drop + corners
    bow = (1 - across**2) * gap
    outline = np.concatenate(
        [np.stack([x + half * across, mouth_y - bow], 1), np.stack([x + half * across, mouth_y + bow], 1)[::-1]]
    )
    points = np.round(outline * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(canvas, [points], (95, 25, 30), cv2.LINE_AA, _SHIFT)
    cv2.polylines(canvas, [points], True, (170, 70, 70), 2, cv2.LINE_AA, _SHIFT)
    return canvas


def _light(face: Face) -> npt.NDArray[np.float32]:
    level, right, down = face.light
    axis = np.linspace(-1, 1, PX, dtype=np.float32)
    light_HW = level * (1 + right * axis[None] + down * axis[:, None])
    return np.clip(light_HW, 0.2, 1.6)[:, :, None].astype(np.float32)


def _colour(values: npt.NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in np.clip(np.round(values), 0, 255))
    return red, green, blue


def _ellipse(
    canvas: npt.NDArray[np.uint8], centre: tuple[float, float], radii: tuple[float, float], colour: tuple[int, int, int]
) -> None:
    scale = 2**_SHIFT
    fixed = (round(centre[0] * scale), round(centre[1] * scale)), (round(radii[0] * scale), round(radii[1] * scale))
    cv2.ellipse(canvas, fixed[0], fixed[1], 0, 0, 360, colour, -1, cv2.LINE_AA, _SHIFT)


def _line(
    canvas: npt.NDArray[np.uint8], points: list[tuple[float, float]], colour: tuple[int, int, int], width: float
) -> None:
    fixed = np.round(np.array(points) * 2**_SHIFT).astype(np.int32)
    cv2.polylines(canvas, [fixed], False, colour, max(1, round(width)), cv2.LINE_AA, _SHIFT)
