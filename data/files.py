"""Files that appear whole or not at all, and safely on the disk.

Each function writes ``<name>.part`` beside the target and renames it over the target. A file has one writer at a time:
two that write the same path at once would share that part.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """The disk or a quota is full. The file that was there before is unharmed; ``errno`` is the system's number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.errno = number


def write_atomically(path: Path, content: bytes | str, *, mode: int | None = None) -> None:
    """Replaces the file at ``path`` by ``content`` (text as UTF-8) and waits until it is on the disk.

    The folder is made if it is missing. ``mode`` gives the file exactly these permissions, before any content is in it;
    without it the process's usual ones. Raises DiskFull, or the OSError that the system gave; ``path`` is then as
    before.
    """
    data = content.encode() if isinstance(content, str) else content
    with replaced(path) as part, part.open("wb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)


@contextmanager
def replaced(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives the name of a file to write; once the block has ended well, that file replaces the one at ``path``.

    For libraries that write to a name themselves. ``durable`` waits until the file is on the disk; leave it out for
    files that can be made again. Raises DiskFull, or whatever the block raises; ``path`` is then as before, and the
    half-written file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        if durable:
            _sync(part)
        part.replace(path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, DiskFull):
            raise DiskFull(
                f"the disk is full: {path.name} was not written; the last complete one is kept. "
                "Free some space and run the same command again to go on.",
                error.errno,
            ) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
