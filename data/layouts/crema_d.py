"""CREMA-D's published layout (Cao et al. 2014): AudioWAV/1001_DFA_ANG_XX.wav with VideoFlash/1001_DFA_ANG_XX.flv."""

import re
from pathlib import Path
from typing import Final

from isthmus.data.clip import ClipRef, Damage, Listing
from isthmus.data.layouts.folder import FILM, SOUND, MediaFolder

LAYOUT: Final = "crema-d"
CLASSES: Final = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
"""Neutral, happy, sad, fear, disgust, anger."""
AUDIO_FOLDER: Final = "AudioWAV"
VIDEO_FOLDER: Final = "VideoFlash"

_NAME: Final = re.compile(
    r"(?P<actor>\d{4})_(?P<sentence>[A-Z0-9]{3})_(?P<emotion>[A-Z]{3})_(?P<level>[A-Z0-9]{1,2})", re.ASCII
)


def parse_name(name: str) -> tuple[str, int]:
    """Return actor and label of a clip's name. Raises ValueError that says what is wrong with it."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError("the name does not parse: expected ACTOR_SENTENCE_EMOTION_LEVEL, as in 1001_DFA_ANG_XX")
    emotion = match["emotion"]
    if emotion not in CLASSES:
        raise ValueError(f"emotion '{emotion}' is none of {' '.join(CLASSES)}")
    return match["actor"], CLASSES.index(emotion)


def read(root: Path) -> Listing:
    """List every clip below ``root``, sorted by name, without opening the files.

    Other endings of sound and film, in upper or lower case, are read too if the layout's own is missing. Names that do
    not parse and links whose target is not here are listed as damaged, clips with only one of their two files as
    incomplete, and every other file as left out.

    Raises ValueError if one of the two folders is missing.
    """
    sound, film = _folder(root / AUDIO_FOLDER, SOUND), _folder(root / VIDEO_FOLDER, FILM)
    audio, video = sound.files, film.files
    refs: list[ClipRef] = []
    incomplete: list[ClipRef] = []
    damaged = [
        damage
        for one, other in ((sound, film), (film, sound))
        for name, damage in sorted(one.dangling.items())
        if name not in other.dangling
    ]
    for name in sorted(audio.keys() | video.keys() | (sound.dangling.keys() & film.dangling.keys())):
        try:
            actor, label = parse_name(name)
        except ValueError as error:
            damaged.append(Damage(name, str(error)))
            continue
        if name not in audio and name not in video:
            damaged.append(Damage(name, f"no sound and no picture: {sound.dangling[name].reason}"))
            continue
        whole = name in audio and name in video
        (refs if whole else incomplete).append(ClipRef(name, audio.get(name), video.get(name), label, actor))
    left_out = (*sound.left_out, *film.left_out)
    return Listing(LAYOUT, CLASSES, tuple(refs), tuple(damaged), tuple(incomplete), left_out)


def _folder(folder: Path, endings: tuple[str, ...]) -> MediaFolder:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: the CREMA-D layout has folders {AUDIO_FOLDER} and {VIDEO_FOLDER}")
    return MediaFolder(folder, endings)
