"""The download of a student into the staging folder. It continues where an earlier try stopped."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from isthmus.edge.link.interface import Link
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import Unavailable
from isthmus.proto.messages import Chunk, patch_name

OnBytes = Callable[[int, int], None]
"""Called with (bytes received, bytes in all) after every stream of a try."""


@dataclass
class Tally:
    """Received bytes of files and patches, including failed tries; and the sizes of the same files without patches."""

    came_bytes: int = 0
    whole_bytes: int = 0


def fetch_student(
    link: Link, slot: StudentSlot, student_id: str, on_bytes: OnBytes, tally: Tally, *, again: bool = False
) -> str:
    """Stage the named student ("" means the newest) and return its id; add to ``tally`` as bytes arrive.

    ``again``: a damaged student is fetched once more.

    Files that are installed and sound are not fetched again, and a patch is fetched if its base is here. Raises what
    the link and the slot raise. Raises Unavailable also if a stream ends without a byte, because asking again at once
    would be an endless loop.
    """
    signed = link.describe_student(student_id)
    manifest = slot.begin(signed, student_id, again=again)

    def counted(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            tally.came_bytes += len(chunk.data)
            yield chunk

    came = 0
    while missing := slot.missing(manifest):
        wanted, offset_bytes = missing[0]
        stream = link.fetch_file(manifest.student_id, wanted.name, offset_bytes)
        of_this = slot.receive(manifest, wanted, counted(stream))
        if not of_this:
            raise Unavailable(f"the download of {wanted.name} delivered nothing")
        came += of_this
        left = slot.missing(manifest)
        if len(left) < len(missing):
            tally.whole_bytes += next(
                f.size_bytes for f in manifest.files if wanted.name in (f.name, patch_name(f.name))
            )
        on_bytes(came, came + sum(file.size_bytes - offset for file, offset in left))
    return manifest.student_id
