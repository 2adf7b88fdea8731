"""A file system in user space (FUSE) that records every change, in a process of its own.

``recorded(folder)`` mounts it; afterwards ``operations`` reads the record, which tests/rigs/edge/power_disk.py plays
back up to any moment. It is a process because a page fault on a mapped file would wait for a Python that cannot run.
"""

import base64
import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.rigs.edge.power_disk import Disk

MARK = ".mark"
"""A symbolic link of this name in the root is not made: its target is noted among the operations."""

_KINDS = {"file": stat.S_IFREG, "folder": stat.S_IFDIR, "link": stat.S_IFLNK}
_READY_S = 60.0


def missing() -> str:
    """Return what this machine lacks for the file system; "" if nothing."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "this machine lets nobody mount by /dev/fuse"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        return f"libfuse is missing, 'make system' installs it ({error})"
    return ""


@contextmanager
def recorded(folder: Path) -> Iterator[Path]:
    """Yield a folder of the recording file system; after the block its record is in ``folder / "record"``."""
    mount = folder / "mount"
    mount.mkdir()
    command = [sys.executable, "-m", "tests.rigs.edge.power_mount", str(mount), str(folder / "record")]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            until_s = time.monotonic() + _READY_S
            while not os.path.ismount(mount):
                if process.poll() is not None or time.monotonic() > until_s:
                    raise OSError(errno.EIO, "the recording file system did not start")
                time.sleep(0.02)
            yield mount
        finally:
            with suppress(subprocess.CalledProcessError):
                unmount = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
                subprocess.run([*unmount, str(mount)], check=True, capture_output=True)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def mark(mount: Path, text: str) -> None:
    """Note that something has happened outside the disk at this moment."""
    os.symlink(text, mount / MARK)


def operations(folder: Path) -> Iterator[list[Any]]:
    """Yield the recorded operations, and ``["mark", text]``."""
    with (folder / "record").open(encoding="utf-8") as file:
        for line in file:
            operation = json.loads(line)
            if operation[0] == "write":
                operation[3] = base64.b64decode(operation[3])
            yield operation


class _Recorder:
    """The calls of the kernel, answered from a ``Disk``. Open files are known by their inode."""

    def __init__(self, record: Any) -> None:
        self.disk = Disk()
        self._record = record

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        inode = self.disk.inodes[self._at(path, fh)]
        size = len(inode.target) if inode.kind == "link" else len(inode.data)
        now = {"st_atime": 0, "st_mtime": 0, "st_ctime": 0, "st_uid": 0, "st_gid": 0}
        return {"st_mode": _KINDS[inode.kind] | inode.mode, "st_nlink": 1, "st_size": size, **now}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *self.disk.inodes[self._at(path)].names]

    def mkdir(self, path: str, mode: int) -> int:
        self._make(path, "folder", mode)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return self._make(path, "file", mode & 0o777)

    def symlink(self, target: str, source: str) -> int:
        if target == f"/{MARK}":
            self._note(["mark", source])
            raise OSError(errno.EEXIST, "noted")
        self._make(target, "link", 0o777, source)
        return 0

    def readlink(self, path: str) -> str:
        return self.disk.inodes[self._at(path)].target

    def open(self, path: str, flags: int) -> int:
        number = self._at(path)
        if flags & os.O_TRUNC:
            self._do(["size", number, 0])
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return bytes(self.disk.inodes[fh].data[offset : offset + size])

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._do(["write", fh, offset, bytes(data)])
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._do(["size", self._at(path, fh), length])
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self._do(["mode", self._at(path), mode & 0o777])
        return 0

    def unlink(self, path: str) -> int:
        self._do(["remove", *self._place(path)])
        return 0

    def rmdir(self, path: str) -> int:
        if self.disk.inodes[self._at(path)].names:
            raise OSError(errno.ENOTEMPTY, path)
        return self.unlink(path)

    def rename(self, old: str, new: str) -> int:
        self._do(["rename", *self._place(old), *self._place(new)])
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._do(["sync", fh])
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._do(["sync", self._at(path)])
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bavail": 1 << 19, "f_bfree": 1 << 19}

    def _at(self, path: str, fh: int | None = None) -> int:
        if fh:
            return fh
        number = self.disk.find(path)
        if number is None:
            raise OSError(errno.ENOENT, path)
        return number

    def _place(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        return self._at(parent), name

    def _make(self, path: str, kind: str, mode: int, target: str = "") -> int:
        return self._do(["make", *self._place(path), kind, mode, target])

    def _do(self, operation: list[Any]) -> int:
        self._note(operation)
        return self.disk.do(operation)

    def _note(self, operation: list[Any]) -> None:
        if operation[0] == "write":
            operation = [*operation[:3], base64.b64encode(operation[3]).decode()]
        self._record.write(json.dumps(operation) + "\n")


def main(mount: str, record: str) -> None:
    """Serve the file system until it is unmounted."""
    import mfusepy

    class Served(_Recorder, mfusepy.Operations):  # type: ignore[misc]
        """The calls that are answered; mfusepy has answers for the others."""

        use_ns = True

    with Path(record).open("w", encoding="utf-8") as file:
        mfusepy.FUSE(Served(file), mount, foreground=True, nothreads=True, hard_remove=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
