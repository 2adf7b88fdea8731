"""Files written whole or not at all, and files of people read as their editors and tools leave them.

A device writes its files only through this module (and SQLite), so that a power loss at any moment leaves each file
whole, as it was or as it was to be: content is on the disk before the name that leads to it, and the folder after it.

Writing puts ``<name>.part`` beside the target and renames it over the target. A file has one writer at a time: two that
write the same path at once would share that part.
"""

import codecs
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

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
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        if durable:
            sync(part)
        part.replace(path)
        if durable:
            sync(path.parent)
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


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make the folder and those above it that are missing, and wait until their names are on the disk."""
    if path.is_dir():
        return
    missing = [path, *(above for above in path.parents if not above.exists())]
    path.mkdir(parents=True, exist_ok=True, mode=mode)
    for folder in missing:
        sync(folder.parent)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, in place of what was there, and wait until the names are on the disk.

    The content must be on the disk already (``sync``, ``sync_tree``).
    """
    os.replace(source, target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def link(name: Path, target: Path) -> None:
    """Make ``name`` a symbolic link to ``target``, in place of the link that was there, in one rename."""
    fresh = name.with_name(f"{name.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    move(fresh, name)


def remove(*paths: Path) -> None:
    """Delete files that are there, in this order, and wait until their names are gone from the disk."""
    gone = {path.parent for path in paths if path.is_symlink() or path.exists()}
    for path in paths:
        path.unlink(missing_ok=True)
    for folder in gone:
        sync(folder)


def sync_tree(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on the disk."""
    for path in sorted(folder.iterdir()):
        sync_tree(path) if path.is_dir() and not path.is_symlink() else sync(path)
    sync(folder)


def not_the_file(path: Path) -> str | None:
    """Return why the file at ``path`` only stands in for another one, with the way out; None if it does not.

    It looks for the pointers that a clone leaves in place of large files (Git LFS, git-annex) and for a web page, such
    as a login form, that was saved instead of a download. Raises OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself: run 'git lfs pull' where it was cloned"
    if start.startswith((b"/annex/objects/", b".git/annex/objects/")):
        return "is a git-annex pointer, not the file itself: run 'git annex get' where it was cloned"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself: download it again and look at what the server sends"
    return None


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file. Raises ValueError if it only stands in for another one, OSError if unreadable."""
    reason = not_the_file(path)
    if reason is not None:
        raise ValueError(f"{path.name} {reason}")
    return path.read_bytes()


def read_text(path: Path, *, limit_bytes: int = 256 << 20) -> str:
    """Return the text of a file that a person may have edited: UTF-8, or UTF-16 or UTF-32 with its byte order mark.

    The mark is taken off, and every kind of line end becomes a newline. Raises ValueError for other bytes, for more
    than ``limit_bytes`` and for a file that only stands in for another one; OSError if the file cannot be read.
    """
    if path.stat().st_size > limit_bytes:
        raise ValueError(f"{path.name} has over {limit_bytes >> 20} MiB")
    with open_text(path) as file:
        return file.read()


@contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file as ``read_text`` reads it, for reading line by line; ``newline`` as in ``open``.

    Raises ValueError for bytes that are not text, also while the caller reads; OSError if the file cannot be read.
    """
    reason = not_the_file(path)
    if reason is not None:
        raise ValueError(f"{path.name} {reason}")
    try:
        with path.open(newline=newline, encoding=_encoding(path)) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason}): save it as UTF-8") from error


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    return "utf-8-sig"
