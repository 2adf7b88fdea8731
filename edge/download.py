"""A student from the cloud into the staging folder, going on where an earlier try stopped."""

from collections.abc import Callable

from isthmus.edge.link import Link
from isthmus.edge.student_slot import StudentSlot
from isthmus.proto.errors import Unavailable

OnBytes = Callable[[int, int], None]
"""Called with (bytes here, bytes in all) after every file."""


def fetch_student(link: Link, slot: StudentSlot, student_id: str, on_bytes: OnBytes) -> tuple[str, int]:
    """Stages the named student ("" names the newest); returns its id and the bytes downloaded.

    What is installed and sound is not fetched again. Raises what the link and the slot raise; Unavailable also where
    a stream ends without a byte, so that an empty answer is not asked for in a loop.
    """
    signed = link.describe_student(student_id)
    manifest = slot.begin(signed, student_id)
    total = sum(file.size_bytes for file in manifest.files)
    fetched = 0
    while missing := slot.missing(manifest):
        file, offset_bytes = missing[0]
        came = slot.receive(manifest, file, link.fetch_file(manifest.student_id, file.name, offset_bytes))
        if not came:
            raise Unavailable(f"the download of {file.name} brought nothing")
        fetched += came
        on_bytes(total - sum(left.size_bytes - offset for left, offset in slot.missing(manifest)), total)
    return manifest.student_id, fetched
