"""Files of students: a folder beside the server, or any fsspec URL (``s3://bucket/prefix``).

A file is stored as ``<owner>/<file name>.<SHA-256 of its content>``: a second write holds the same bytes, so
a late or repeated write damages nothing. A reader names the hash too, and the content is compared with it. Files that
were stored before 0.2 have no hash in their name and are still found.

Owner and name are checked against a narrow alphabet, so that no input from a client can name another place. A file
appears under its name whole or not at all.
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
from isthmus.proto.errors import Corrupt, InvalidInput, IsthmusError, NotYours, StorageFull, Unavailable

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STORED: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(\.[0-9a-f]{64})?")
_DAMAGED: Final = "the server's copy of this student is damaged; its operator must restore it from a backup"
_OUT_OF_REACH: Final = "the store of artefacts cannot be reached; try again later"
_OBJECT_STORES: Final = {"s3", "s3a", "gs", "gcs", "abfs", "az"}
_BLOCK_BYTES: Final = 1 << 20


def valid_name(name: str) -> bool:
    """Return whether ``name`` may name an owner (a student, a task) or one of its files."""
    return _NAME.fullmatch(name) is not None


def valid_stored_name(name: str) -> bool:
    """Return whether ``name`` may be the name of a stored file, with or without its hash."""
    return _STORED.fullmatch(name) is not None


class Artefacts:
    """Files of students under one URL. Every method blocks: call it off the event loop."""

    def __init__(self, url: str) -> None:
        """Raises InvalidInput for a URL that cannot be used, with the way out."""
        try:
            # Another server may have written what an earlier listing did not show.
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            hint = "pip install 'isthmus[s3]'" if url.startswith("s3:") else "give a folder or s3://BUCKET/PREFIX"
            raise InvalidInput(f"the artefacts' URL cannot be used ({str(error)[:80]}): {hint}") from error
        self._url = url
        self._local = isinstance(self._fs, LocalFileSystem)
        self._keys_only = self._fs.protocol == "memory" or not _OBJECT_STORES.isdisjoint(self._fs.protocol)
        """An object store has no folders to make, and must not be asked to make its bucket."""
        if self._local:
            self._fs.makedirs(self._root, exist_ok=True)

    def check(self) -> None:
        """Write, read and remove a small file. Raises InvalidInput, which names the way out, if that fails."""
        path, content = f"{self._root}/.check-{uuid4().hex}", b"isthmus"
        try:
            self._fs.pipe_file(path, content)
            if self._fs.cat_file(path) != content:
                raise OSError("what was written is not what is read")
            self._fs.rm_file(path)
        except FileNotFoundError as error:
            raise InvalidInput(f"artefacts: there is no {self._url}; create the bucket, or correct the URL") from error
        except PermissionError as error:
            raise InvalidInput(
                f"artefacts: no right to write, read or delete in {self._url}; correct the credentials or the policy"
            ) from error
        except Exception as error:
            if isinstance(error, OSError) and disk_is_full(error):
                raise StorageFull("the server's disk is full; free some space") from error
            reason = " ".join(str(error).split())[:160]
            raise InvalidInput(f"artefacts: {self._url} cannot be used ({type(error).__name__}: {reason})") from error

    def put(self, owner: str, name: str, source: Path) -> bytes:
        """Copy the file ``source`` to the store. Returns its SHA-256.

        Raises StorageFull (and leaves nothing behind) if the disk is full, Unavailable if the store is out of reach.
        """
        if not valid_name(owner) or not valid_name(name):
            raise NotYours("no such file")
        with source.open("rb") as reader:
            digest = hashlib.file_digest(reader, "sha256").digest()
        self.place(owner, f"{name}.{digest.hex()}", source)
        return digest

    def place(self, owner: str, stored_name: str, source: Path) -> None:
        """Copy the file ``source`` under a name of ``names``. Raises what ``put`` raises."""
        target = self._path(owner, stored_name)
        try:
            if not self._keys_only:
                self._fs.makedirs(self._fs._parent(target), exist_ok=True)
            if not self._local:
                # In an object store an object appears only when its upload ends.
                self._fs.put_file(str(source), target)
                return
            staged = f"{self._fs._parent(target)}/.{uuid4().hex}.part"
            try:
                with source.open("rb") as reader, open(staged, "wb") as writer:
                    shutil.copyfileobj(reader, writer, _BLOCK_BYTES)
                    writer.flush()
                    os.fsync(writer.fileno())
                os.replace(staged, target)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(staged)
        except Exception as error:
            if isinstance(error, OSError) and disk_is_full(error):
                raise StorageFull("the server's disk is full; try again later") from error
            if not self._local:
                raise Unavailable(_OUT_OF_REACH) from error
            raise

    def sha256(self, owner: str, name: str, sha256: bytes | None = None) -> bytes:
        """Return the SHA-256 of a file's content. Raises NotYours if there is no such file."""
        digest = hashlib.sha256()
        with self.open(owner, name, sha256) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.digest()

    def fingerprint(self, owner: str, name: str, sha256: bytes | None = None) -> tuple[object, ...]:
        """Return what changes when a file is written again, read without reading it. Raises NotYours."""
        for path in self._places(owner, name, sha256):
            with suppress(FileNotFoundError), self._reached():
                found = self._fs.info(path)
                return found.get("size"), found.get("mtime"), found.get("ETag")
        raise self._not_found()

    @contextmanager
    def open(self, owner: str, name: str, sha256: bytes | None = None) -> Iterator[IO[bytes]]:
        """Open a file for reading: the one of this hash, or one that was stored without.

        Raises NotYours, and Corrupt if a folder is in the file's place.
        ``name`` may be one of ``names``. The content is not compared with the hash; see ``read`` and ``on_disk``.
        """
        file = None
        for path in self._places(owner, name, sha256):
            with suppress(FileNotFoundError), self._reached():
                try:
                    file = self._fs.open(path, "rb")
                except IsADirectoryError as error:
                    raise Corrupt(_DAMAGED) from error
                break
        if file is None:
            raise self._not_found()
        with file:
            yield file

    def read(self, owner: str, name: str, sha256: bytes, most_bytes: int) -> bytes:
        """Return a file's content, at most ``most_bytes`` of it. Raises NotYours, and Corrupt if it is damaged."""
        with self.open(owner, name, sha256) as file:
            data = file.read(most_bytes)
        if hashlib.sha256(data).digest() != sha256:
            raise Corrupt(_DAMAGED)
        return data

    @contextmanager
    def on_disk(self, owner: str, name: str, scratch: Path, sha256: bytes | None = None) -> Iterator[Path]:
        """Yield a path to the file: the file itself in a folder, else a temporary copy in ``scratch``.

        Raises NotYours, and Corrupt if the copy's content is not that of ``sha256``.
        """
        if self._local:
            found = [path for path in self._places(owner, name, sha256) if os.path.exists(path)]
            if not found:
                raise NotYours("no such file")
            _check(Path(found[0]), sha256)
            yield Path(found[0])
            return
        scratch.mkdir(parents=True, exist_ok=True)
        copy = scratch / f".{uuid4().hex}"
        try:
            with self.open(owner, name, sha256) as reader, copy.open("wb") as writer:
                shutil.copyfileobj(reader, writer, _BLOCK_BYTES)
            _check(copy, sha256)
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def names(self, owner: str) -> list[str]:
        """Return the stored names of an owner's files (with their hash), sorted; none if there is no such owner."""
        if not valid_name(owner):
            raise NotYours("no such student")
        try:
            found = self._fs.ls(f"{self._root}/{owner}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for name in (path.rpartition("/")[2] for path in found) if valid_stored_name(name))

    def remove(self, owner: str) -> None:
        """Remove all files of an owner, if there are any."""
        if not valid_name(owner):
            raise NotYours("no such student")
        with suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{owner}", recursive=True)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Let errors of a store on another machine be Unavailable, so that nobody takes a fault for an absent file."""
        try:
            yield
        except (FileNotFoundError, IsthmusError):
            raise
        except Exception as error:
            if self._local:
                raise
            raise Unavailable(_OUT_OF_REACH) from error

    def _not_found(self) -> IsthmusError:
        """Return what it means that a file was not found: the file is not there, or its whole bucket is not."""
        if self._keys_only and self._fs.protocol != "memory":
            with self._reached():
                if not self._fs.exists(self._root.partition("/")[0]):
                    return Unavailable(_OUT_OF_REACH)
        return NotYours("no such file")

    def _places(self, owner: str, name: str, sha256: bytes | None) -> tuple[str, ...]:
        plain = self._path(owner, name)
        return (plain,) if sha256 is None else (f"{plain}.{sha256.hex()}", plain)

    def _path(self, owner: str, name: str) -> str:
        if not valid_name(owner) or not valid_stored_name(name):
            raise NotYours("no such file")
        return f"{self._root}/{owner}/{name}"


def _check(path: Path, sha256: bytes | None) -> None:
    if sha256 is None:
        return
    if path.is_dir():
        raise Corrupt(_DAMAGED)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != sha256:
            raise Corrupt(_DAMAGED)
