"""Sound and picture of a clip from media files (WAV, FLV, MP4 and whatever else FFmpeg's libraries read), through PyAV.

PyAV's wheels carry the decoders, so no FFmpeg has to be installed on the machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from isthmus.data.clip import ClipError, ClipRef, DecodedClip
from isthmus.data.media.pictures import read_pictures
from isthmus.data.media.sound import read_sound
from isthmus.data.media.source import Unusable
from isthmus.data.transforms import InputSpec, fitted, spectrogram


def decode(ref: ClipRef, spec: InputSpec) -> DecodedClip:
    """Return the sound and picture of a clip, prepared as in ``transforms``.

    Both are of the event between ref.start_s and ref.end_s (the whole file if they are None): its sound tiled or cut
    to the spec's duration, and spec.frames_stored frames from the middles of as many equal stretches, in time order.
    A path that is None gives None: that was not captured. A file whose path is given must hold what the path is for.

    Raises ClipError naming the clip and the reason: missing, empty, truncated, damaged, without sound, without
    picture, or neither file.
    """
    with _naming(ref):
        return DecodedClip(
            None if ref.audio_path is None else spectrogram(_sound(ref, spec), spec),
            None if ref.video_path is None else read_pictures(ref.video_path, spec, ref.start_s, ref.end_s),
        )


def check_decodes(ref: ClipRef, spec: InputSpec) -> None:
    """Decode the clip as ``decode`` does, without computing its spectrogram.

    Raises ClipError for exactly the clips for which ``decode`` raises it, with the same reason.
    """
    with _naming(ref):
        if ref.audio_path is not None:
            fitted(_sound(ref, spec), spec)
        if ref.video_path is not None:
            read_pictures(ref.video_path, spec, ref.start_s, ref.end_s)


def decode_sound(ref: ClipRef, spec: InputSpec) -> npt.NDArray[np.float32]:
    """Return the clip's mono samples (T,) at the spec's rate, at most its duration: the input of its spectrogram.

    Raises ClipError naming the clip and the reason.
    """
    with _naming(ref):
        return _sound(ref, spec)


@contextmanager
def _naming(ref: ClipRef) -> Iterator[None]:
    try:
        if ref.audio_path is None and ref.video_path is None:
            raise Unusable("it has neither a sound nor a video file")
        yield
    except (Unusable, ValueError) as error:
        raise ClipError(ref.name, str(error)) from error


def _sound(ref: ClipRef, spec: InputSpec) -> npt.NDArray[np.float32]:
    if ref.audio_path is None:
        raise Unusable("it has no sound file")
    return read_sound(ref.audio_path, spec, ref.start_s, ref.end_s)
