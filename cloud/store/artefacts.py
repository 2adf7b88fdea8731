"""Files of students: a folder beside the server, or any fsspec URL (``s3://bucket/prefix``).

A key is ``<student id>/<file name>``. Both are checked against a narrow alphabet, so that no input from a client can
name another place. A file appears under its key whole or not at all.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from isthmus.cloud.store.database import disk_is_full
from isthmus.proto.errors import NotYours, StorageFull

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def valid_name(name: str) -> bool:
    """Return whether ``name`` may name a student or one of its files."""
    return _NAME.fullmatch(name) is not None


class Artefacts:
    """Files of students under one URL. Every method blocks: call it off the event loop."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._fs.makedirs(self._root, exist_ok=True)

    def put(self, student_id: str, name: str, source: Path) -> None:
        """Copy the file ``source`` to its key atomically, replacing any previous file.

        Raises StorageFull (and leaves nothing behind) if the disk is full.
        """
        target = self._path(student_id, name)
        self._fs.makedirs(self._fs._parent(target), exist_ok=True)
        # In an object store an object appears only when its upload ends; a folder needs a rename.
        staged = f"{self._fs._parent(target)}/.{uuid4().hex}.part" if self._local else target
        try:
            with source.open("rb") as reader, self._fs.open(staged, "wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
                if self._local:
                    writer.flush()
                    os.fsync(writer.fileno())
            if self._local:
                os.replace(staged, target)
        except BaseException as error:
            if self._local:
                with suppress(FileNotFoundError):
                    os.unlink(staged)
            if isinstance(error, OSError) and disk_is_full(error):
                raise StorageFull("the server's disk is full; try again later") from error
            raise

    def size_bytes(self, student_id: str, name: str) -> int:
        """Return a file's size. Raises NotYours if there is no such file."""
        try:
            return int(self._fs.size(self._path(student_id, name)))
        except FileNotFoundError:
            raise NotYours("no such file") from None

    def sha256(self, student_id: str, name: str) -> bytes:
        """Return the SHA-256 of a file's content. Raises NotYours if there is no such file."""
        digest = hashlib.sha256()
        with self.open(student_id, name) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.digest()

    def fingerprint(self, student_id: str, name: str) -> tuple[object, ...]:
        """Return what changes when a file is written again, read without reading it. Raises NotYours."""
        try:
            found = self._fs.info(self._path(student_id, name))
        except FileNotFoundError:
            raise NotYours("no such file") from None
        return found.get("size"), found.get("mtime"), found.get("ETag")

    @contextmanager
    def open(self, student_id: str, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading. Raises NotYours if there is no such file."""
        try:
            file = self._fs.open(self._path(student_id, name), "rb")
        except FileNotFoundError:
            raise NotYours("no such file") from None
        with file:
            yield file

    @contextmanager
    def on_disk(self, student_id: str, name: str, scratch: Path) -> Iterator[Path]:
        """Yield a path to the file: the file itself in a folder, else a temporary copy in ``scratch``."""
        path = self._path(student_id, name)
        if self._local:
            yield Path(path)
            return
        scratch.mkdir(parents=True, exist_ok=True)
        copy = scratch / f"{uuid4().hex}-{name}"
        try:
            self._fs.get_file(path, str(copy))
            yield copy
        except FileNotFoundError:
            raise NotYours("no such file") from None
        finally:
            copy.unlink(missing_ok=True)

    def names(self, student_id: str) -> list[str]:
        """Return the names of a student's files, sorted; none if there is no such student."""
        if not valid_name(student_id):
            raise NotYours("no such student")
        try:
            found = self._fs.ls(f"{self._root}/{student_id}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for name in (path.rpartition("/")[2] for path in found) if valid_name(name))

    def remove(self, student_id: str) -> None:
        """Remove all files of a student, if there are any."""
        if not valid_name(student_id):
            raise NotYours("no such student")
        with suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{student_id}", recursive=True)

    def _path(self, student_id: str, name: str) -> str:
        if not valid_name(student_id) or not valid_name(name):
            raise NotYours("no such file")
        return f"{self._root}/{student_id}/{name}"
