"""A scene for a camera and a microphone: a drawn person who speaks in a dull room, as a film and a sound file."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from isthmus.data.media.encode import write_mp4, write_wav
from isthmus.data.synthetic.face import FPS, PX, Face, film
from isthmus.data.synthetic.voice import RATE_HZ, Voice, speak
from isthmus.edge.capture.cameras import WIDEST_PX
from isthmus.edge.capture.gates import FaceGate

ROOM: tuple[int, int] = (240, 320)
_VOWELS = ("a", "i", "u", "a", "o", "e", "i", "a")
_CUES = 6


def speech(seconds: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return ``seconds`` of a voice at RATE_HZ, with pauses between sentences."""
    parts: list[npt.NDArray[np.float32]] = []
    rng = np.random.default_rng(seed)
    who = Voice.draw(rng)
    while sum(map(len, parts)) < seconds * RATE_HZ:
        cues_V = rng.normal(0, 0.5, _CUES)
        parts += [speak(who, cues_V, _VOWELS, rng, snr_db=25), np.zeros(RATE_HZ // 4, np.float32)]
    return np.concatenate(parts)[: round(seconds * RATE_HZ)]


def faces(count: int, *, others: int = 0) -> npt.NDArray[np.uint8]:
    """Return ``count`` pictures (count, height, width, 3) of a person whose face the cascade finds.

    ``others``: as many smaller copies of the face stand beside the person, at most two.
    """
    gate = FaceGate()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        drawn = film(Face.draw(rng), np.zeros(_CUES), np.full(count, 0.3), rng, grain=2.0, unrest=0.3)
        room = rng.normal(120, 3, (count, *ROOM, 3)).clip(0, 255).astype(np.uint8)
        room[:, 60 : 60 + PX, 80 : 80 + PX] = drawn
        for number in range(others):
            left = (0, ROOM[1] - PX // 2)[number]
            room[:, : PX // 2, left : left + PX // 2] = drawn[:, ::2, ::2]
        if gate.faces(room[0]):
            return room
    raise AssertionError("the cascade finds none of 40 drawn faces")


def write_scene(folder: Path, seconds: float = 20.0) -> tuple[Path, Path]:
    """Write a film and a sound file of a person who speaks all the time; return their paths."""
    picture, sound = folder / "person.mp4", folder / "person.wav"
    spoken_T = speech(seconds)
    write_wav(sound, spoken_T, RATE_HZ)
    write_mp4(picture, faces(round(seconds * FPS)), FPS, spoken_T, RATE_HZ)
    return picture, sound


def write_empty_room(folder: Path, seconds: float = 20.0) -> tuple[Path, Path]:
    """Write a film and a sound file of a room without anybody, in which a fan runs; return their paths.

    The film has the size at which a device takes the pictures of a camera.
    """
    picture, sound = folder / "empty.mp4", folder / "empty.wav"
    rng = np.random.default_rng(0)
    fan_T = rng.normal(0, 0.002, round(seconds * RATE_HZ)).astype(np.float32)
    write_wav(sound, fan_T, RATE_HZ)
    walls_HWC = rng.normal(120, 10, (3 * WIDEST_PX // 4, WIDEST_PX, 3))
    frames = [rng.normal(walls_HWC, 1).clip(0, 255).astype(np.uint8) for _ in range(round(seconds * FPS))]
    write_mp4(picture, np.stack(frames), FPS, fan_T, RATE_HZ)
    return picture, sound
