"""CREMA-D's published layout (Cao et al. 2014): AudioWAV/1001_DFA_ANG_XX.wav with VideoFlash/1001_DFA_ANG_XX.flv."""

import re
from pathlib import Path
from typing import Final

from isthmus.data.clip import ClipRef, Damage, Listing

LAYOUT: Final = "crema-d"
CLASSES: Final = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
"""Neutral, happy, sad, fear, disgust, anger: the order of spec 1."""
AUDIO_FOLDER: Final = "AudioWAV"
VIDEO_FOLDER: Final = "VideoFlash"

_NAME: Final = re.compile(
    r"(?P<actor>\d{4})_(?P<sentence>[A-Z0-9]{3})_(?P<emotion>[A-Z]{3})_(?P<level>[A-Z0-9]{1,2})", re.ASCII
)


def parse_name(name: str) -> tuple[str, int]:
    """Actor and label of a clip's name. Raises ValueError saying what is wrong with it."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError("the name does not parse: expected ACTOR_SENTENCE_EMOTION_LEVEL, as in 1001_DFA_ANG_XX")
    emotion = match["emotion"]
    if emotion not in CLASSES:
        raise ValueError(f"emotion '{emotion}' is none of {' '.join(CLASSES)}")
    return match["actor"], CLASSES.index(emotion)


def read(root: Path) -> Listing:
    """Lists every clip below ``root``, sorted by name, without opening the files.

    Names that do not parse are listed as damaged, clips with only one of their two files as incomplete.
    Raises ValueError where one of the two folders is missing.
    """
    audio = _files(root / AUDIO_FOLDER, ".wav")
    video = _files(root / VIDEO_FOLDER, ".flv")
    refs: list[ClipRef] = []
    incomplete: list[ClipRef] = []
    damaged: list[Damage] = []
    for name in sorted(audio.keys() | video.keys()):
        try:
            actor, label = parse_name(name)
        except ValueError as error:
            damaged.append(Damage(name, str(error)))
            continue
        whole = name in audio and name in video
        (refs if whole else incomplete).append(ClipRef(name, audio.get(name), video.get(name), label, actor))
    return Listing(LAYOUT, CLASSES, tuple(refs), tuple(damaged), tuple(incomplete))


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: the CREMA-D layout has folders {AUDIO_FOLDER} and {VIDEO_FOLDER}")
    return {
        path.stem: path
        for path in folder.iterdir()
        if path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file()
    }
