"""A clip before decoding (a reference to its files) and after (two arrays)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


class ClipError(Exception):
    """A clip that cannot be used: ``name`` says which, and ``reason`` why, in words for the owner of the files."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True)
class ClipRef:
    """The files of a clip, and what is known about it.

    ``start_s`` and ``end_s`` cut an event out of longer files; None means the beginning and the end. ``label`` indexes
    the listing's classes; None if it is unknown.

    >>> ClipRef("1001_A01_HAP_XX", Path("1001_A01_HAP_XX.wav"), None, label=1, actor="1001").video_path is None
    True
    """

    name: str
    audio_path: Path | None
    video_path: Path | None
    label: int | None
    actor: str | None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class DecodedClip:
    """A clip as it is cached.

    ``spectrogram_FT``: float32 (spec.spectrogram_bins, spec.spectrogram_columns), log power, standardised.
    ``frames_KHWC``: uint8 (spec.frames_stored, spec.stored_px, spec.stored_px, 3), RGB, in time order. A modality that
    was not captured is None; at least one is there.
    """

    spectrogram_FT: npt.NDArray[np.float32] | None
    frames_KHWC: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Damage:
    """A clip, file or line that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """A data set's clips as its layout declares them; nothing is decoded yet.

    ``refs`` are sorted by name, names are unique, and every ref has both its files. ``incomplete``, sorted likewise,
    have one of the two files, and None for the other path: a device classifies them, training leaves them out. A clip
    with neither file is in ``damaged``. ``left_out`` are the files of the folder that belong to no clip; they do no
    harm, but may be there by mistake.

    >>> listing.layout, len(listing.refs), listing.classes
    ('crema-d', 18, ('NEU', 'HAP', 'SAD', 'FEA', 'DIS', 'ANG'))
    """

    layout: str
    classes: tuple[str, ...]
    refs: tuple[ClipRef, ...]
    damaged: tuple[Damage, ...]
    incomplete: tuple[ClipRef, ...] = ()
    left_out: tuple[Damage, ...] = ()
