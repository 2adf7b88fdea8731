"""PURE: stamp blocks of sound, and cut a clip out of stamped pictures and blocks.

The stamps of both are of one clock. Within a clip, blocks follow each other sample by sample, as the sound card counts
them; each clip starts again from the stamps, so a sound card whose clock runs fast or slow shifts nothing by more than
its error within one clip.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

GAP_S: Final = 0.03
"""A block that begins so much earlier or later than the one before has ended was not recorded right after it."""
LEAST_SOUND: Final = 0.8
"""The share of a clip of which there must be sound."""
FEWEST_PICTURES: Final = 3
LATE_BLOCKS: Final = 10
"""A busy machine may hear of this many blocks in a row late, except for one of them."""


@dataclass(frozen=True)
class Block:
    """Mono samples, and the time of the first one."""

    at_s: float
    rate_hz: int
    samples_T: npt.NDArray[np.float32]


@dataclass(frozen=True)
class StampedPicture:
    at_s: float
    picture_HWC: npt.NDArray[np.uint8]


class BlockTimes:
    """Stamps blocks of a sound card that records without a pause.

    A process hears of a block late, never early, so the least lateness of the last LATE_BLOCKS blocks is taken for all
    of them; samples are counted in between. Without this a busy machine would tear gaps into sound that has none.
    A card whose clock runs fast or slow is followed, with a lag of its error in LATE_BLOCKS blocks.
    """

    def __init__(self, rate_hz: int) -> None:
        self._rate_hz = rate_hz
        self._samples = 0
        self._offsets_s: deque[float] = deque(maxlen=LATE_BLOCKS)

    def stamp(self, measured_s: float, samples: int, *, lost: bool = False) -> float:
        """Return the time of a block's first sample. ``measured_s``: the time as it was measured, on time or late.

        ``lost``: the sound card says that samples before this block were lost.
        """
        if lost:
            self._offsets_s.clear()
        counted_s = self._samples / self._rate_hz
        self._offsets_s.append(measured_s - counted_s)
        self._samples += samples
        return counted_s + min(self._offsets_s)


def sound_of(blocks: Sequence[Block], start_s: float, end_s: float) -> npt.NDArray[np.float32] | None:
    """Return the samples of [start, end) at the blocks' rate, with zeros in gaps; None if too much is missing.

    ``blocks``: in order of time. If the rate changes in between, only the last one's blocks count.
    """
    if not blocks:
        return None
    rate_hz = blocks[-1].rate_hz
    wanted_T = np.zeros(round((end_s - start_s) * rate_hz), np.float32)
    filled = 0
    due_s: float | None = None
    for block in blocks:
        if block.rate_hz != rate_hz:
            continue
        at_s = block.at_s if due_s is None or abs(block.at_s - due_s) > GAP_S else due_s
        due_s = at_s + len(block.samples_T) / rate_hz
        first = round((at_s - start_s) * rate_hz)
        skipped = max(0, -first)
        part_T = block.samples_T[skipped : max(skipped, len(wanted_T) - first)]
        if len(part_T) and first + skipped < len(wanted_T):
            wanted_T[first + skipped : first + skipped + len(part_T)] = part_T
            filled += len(part_T)
    return wanted_T if filled >= LEAST_SOUND * len(wanted_T) else None


def pictures_of(pictures: Sequence[StampedPicture], start_s: float, end_s: float) -> list[npt.NDArray[np.uint8]] | None:
    """Return the pictures of [start, end) in order of time; None if there are too few."""
    found = [each.picture_HWC for each in pictures if start_s <= each.at_s < end_s]
    return found if len(found) >= FEWEST_PICTURES else None
