"""Clips of a data set, replayed from files, and what every source of clips has in common."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from isthmus.data.clip import ClipError, ClipRef, Damage, DecodedClip
from isthmus.data.files import read_text
from isthmus.data.transforms import InputSpec
from isthmus.proto.errors import IsthmusError

Clock = Callable[[], float]


class CaptureUnavailable(IsthmusError):
    """This device has no usable camera or microphone."""


@dataclass(frozen=True)
class Taken:
    """A clip ready for the encoders, and the milliseconds that decoding took."""

    ref: ClipRef
    clip: DecodedClip
    decode_ms: float


def replay(
    refs: Iterable[ClipRef], spec: InputSpec, clock: Clock, on_damage: Callable[[Damage], None]
) -> Iterator[Taken]:
    """Decode one clip at a time, in order. An unusable clip is reported to ``on_damage`` and left out."""
    # Imported here: the process that reads camera and microphone needs no decoder, which takes 17 MB.
    from isthmus.data.media.decode import decode

    for ref in refs:
        began_s = clock()
        try:
            clip = decode(ref, spec)
        except ClipError as error:
            on_damage(Damage(error.name, error.reason))
            continue
        yield Taken(ref, clip, (clock() - began_s) * 1000)


def raw_bytes(refs: Iterable[ClipRef]) -> int:
    """Return the bytes of the clips' files: the cost of sending them raw."""
    paths = {path for ref in refs for path in (ref.audio_path, ref.video_path) if path is not None}
    return sum(path.stat().st_size for path in paths if path.is_file())


def read_names(path: Path) -> tuple[str, ...]:
    """Read clip names from a text file, one per line, without blank lines and ``#`` comments. Raises ValueError."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the list of clips cannot be read: {_reason(error)}") from error
    names = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{path}: the list is empty or names a clip twice")
    return names


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
