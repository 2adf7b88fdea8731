"""The copies of releases on a worker's machine: fetched from the artefacts when a job needs one, few at a time.

    <root>/<release id>/          the files, each compared with its hash before the folder gets this name
    <root>/<release id>.lock      held by each process that uses the copy, and alone by the one that makes or removes it

When another copy needs room, those go that were used the longest time ago and that no process uses.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from isthmus.cloud.releases.files import owner_of
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import disk_is_full
from isthmus.cloud.store.releases import ReleaseFile, ReleaseRow
from isthmus.proto.errors import Corrupt, NotYours, StorageFull

_BLOCK_BYTES: Final = 1 << 20
_SPARE_BYTES: Final = 64 << 20
"""Left free on the disk after a copy was made."""


@dataclass
class Copies:
    """The copies in ``root``, of at most ``most_bytes`` together. One release alone may be larger.

    A process that uses a copy holds it until ``let_go``.
    """

    root: Path
    artefacts: Artefacts
    most_bytes: int
    _held: dict[str, IO[bytes]] = field(default_factory=dict, repr=False)

    def folder(self, release: ReleaseRow) -> Path:
        """Return the folder of a release, which is fetched unless it is here. It stays until ``let_go``.

        Raises Corrupt if a file in the artefacts is damaged or gone, StorageFull, and Unavailable.
        """
        name = release.release_id
        folder = self.root / name
        self.root.mkdir(parents=True, exist_ok=True)
        while name not in self._held:
            self._hold(name)
            if folder.is_dir():
                break
            self.let_go(name)
            with self._alone(name):
                if not folder.is_dir():
                    self._make_room(release.size_bytes, name)
                    self._fetch(release, folder)
        os.utime(folder, (time.time(), time.time()))
        return folder

    def let_go(self, release_id: str) -> None:
        """Let another process remove the copy, if it needs the room."""
        held = self._held.pop(release_id, None)
        if held is not None:
            held.close()

    def _fetch(self, release: ReleaseRow, folder: Path) -> None:
        part = self.root / f"{release.release_id}.part"
        shutil.rmtree(part, ignore_errors=True)
        if shutil.disk_usage(self.root).free < release.size_bytes + _SPARE_BYTES:
            raise StorageFull(f"this worker's disk cannot hold the {release.size_bytes} bytes of the release")
        try:
            for path, file in release.files.items():
                self._fetch_file(release.release_id, path, file, part / path)
            os.replace(part, folder)
        except OSError as error:
            if disk_is_full(error):
                raise StorageFull("this worker's disk is full") from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _fetch_file(self, release_id: str, path: str, file: ReleaseFile, target: Path) -> None:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise Corrupt(f"release {release_id} names a file outside its folder: the database is damaged")
        target.parent.mkdir(parents=True, exist_ok=True)
        digest, sha256 = hashlib.sha256(), bytes.fromhex(file.sha256)
        try:
            with (
                self.artefacts.open(owner_of(release_id), target.name, sha256) as reader,
                target.open("wb") as writer,
            ):
                while block := reader.read(_BLOCK_BYTES):
                    digest.update(block)
                    if writer.tell() + len(block) > file.size_bytes:  # the disk was asked for so much room
                        raise Corrupt(self._damaged(release_id, path, "damaged in"))
                    writer.write(block)
        except NotYours as error:
            raise Corrupt(self._damaged(release_id, path, "gone from")) from error
        if digest.digest() != sha256:
            raise Corrupt(self._damaged(release_id, path, "damaged in"))

    def _damaged(self, release_id: str, path: str, how: str) -> str:
        return (
            f"{path} of release {release_id} is {how} the artefacts: the server's operator must publish the release "
            "again, which mends it"
        )

    def _make_room(self, wanted_bytes: int, name: str) -> None:
        for part in self.root.glob("*.part"):  # of those who were killed while they fetched
            with self._alone(part.name.removesuffix(".part"), wait=False) as mine:
                if mine:
                    shutil.rmtree(part, ignore_errors=True)
        copies = {
            path: _size_bytes(path)
            for path in self.root.iterdir()
            if path.is_dir() and path.name != name and not path.name.endswith(".part")
        }
        for path in sorted(copies, key=_used_s):
            if sum(copies.values()) + wanted_bytes <= self.most_bytes:
                return
            with self._alone(path.name, wait=False) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)
                    del copies[path]

    def _hold(self, name: str) -> None:
        lock = self._lock_file(name)
        fcntl.flock(lock, fcntl.LOCK_SH)
        self._held[name] = lock

    @contextmanager
    def _alone(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a copy alone. Yields False if others use it and ``wait`` is False."""
        with self._lock_file(name) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def _lock_file(self, name: str) -> IO[bytes]:
        return (self.root / f"{name}.lock").open("ab")


def _size_bytes(folder: Path) -> int:
    """Return the bytes of a copy, less those that another process removes at this moment."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.stat(os.path.join(parent, name)).st_size
    return found


def _used_s(folder: Path) -> float:
    """Return when a copy was last used, in Unix seconds; 0 if another process has removed it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
