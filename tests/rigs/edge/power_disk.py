"""A model of a disk that may lose what was not synced: which files are there after a power loss.

After a power loss a file holds what its last fsync saw, and of the writes since then each may be there, missing or
torn. A folder holds the names that its last fsync saw, and of the changes since then the first few, in their order. A
rename is there or not, in both folders. POSIX promises no more, and file systems differ in how much more they keep.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SECTOR = 512
ROOT = 1

Loss = Literal["all", "data", "random"]
"""What is lost of the unsynced: everything; the data, but no name; or, of each, what chance decides."""


@dataclass
class Inode:
    """A file, folder (``names``) or symbolic link (``target``). ``synced``: the data on the disk."""

    kind: str
    mode: int
    target: str = ""
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    unsynced: list[tuple[str, int, bytes]] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    synced_names: dict[str, int] = field(default_factory=dict)


Change = list[tuple[int, str, int | None]]
"""(folder, name, inode or None for its absence): what one operation changes, all or nothing."""


Left = dict[str, tuple[str, int, bytes]]
"""(kind, mode, content or target) by path, folders before what is in them."""


class Disk:
    """Applies operations, each a list that JSON can hold; see ``do`` for their names."""

    def __init__(self) -> None:
        self.inodes = {ROOT: Inode("folder", 0o755)}
        self.unsynced_names: list[Change] = []
        self._next = ROOT + 1

    def do(self, operation: list[Any]) -> int:
        """Apply an operation; return the inode that it made, or 0.

        ``make folder name kind mode target``, ``write inode offset data``, ``size inode bytes``, ``mode inode mode``,
        ``remove folder name``, ``rename folder name folder name``, ``sync inode``.
        """
        name, *rest = operation
        return int(getattr(self, f"_{name}")(*rest) or 0)

    def find(self, path: str) -> int | None:
        """Return the inode of an absolute path, without following a link at its end; None if there is none."""
        at = ROOT
        for part in [each for each in path.split("/") if each]:
            found = self.inodes[at].names.get(part)
            if found is None:
                return None
            at = found
        return at

    def after_power_loss(self, loss: Loss, rng: random.Random) -> "Left":
        """Return what is there after a power loss at this moment."""
        names = {number: dict(inode.synced_names) for number, inode in self.inodes.items()}
        ended: set[int] = set()
        for change in self.unsynced_names:
            folders = {each[0] for each in change}
            lost = loss == "all" or (loss == "random" and (bool(folders & ended) or rng.random() < 0.3))
            if lost:
                ended |= folders
                continue
            for parent, name, number in change:
                _set(names[parent], name, number)
        left: Left = {}

        def look(number: int, path: str) -> None:
            for name, child in sorted(names[number].items()):
                inode, below = self.inodes[child], f"{path}/{name}"
                content = inode.target.encode() if inode.kind == "link" else _content(inode, loss, rng)
                left[below] = (inode.kind, inode.mode & 0o777, content)
                look(child, below)

        look(ROOT, "")
        return left

    def _make(self, parent: int, name: str, kind: str, mode: int, target: str) -> int:
        number, self._next = self._next, self._next + 1
        self.inodes[number] = Inode(kind, mode, target)
        self._change([(parent, name, number)])
        return number

    def _write(self, number: int, offset: int, data: bytes) -> None:
        inode = self.inodes[number]
        _apply(inode.data, offset, data)
        inode.unsynced.append(("write", offset, data))

    def _size(self, number: int, size: int) -> None:
        inode = self.inodes[number]
        _resize(inode.data, size)
        inode.unsynced.append(("size", size, b""))

    def _mode(self, number: int, mode: int) -> None:
        self.inodes[number].mode = mode

    def _remove(self, parent: int, name: str) -> None:
        self._change([(parent, name, None)])

    def _rename(self, parent: int, name: str, new_parent: int, new_name: str) -> None:
        number = self.inodes[parent].names[name]
        self._change([(parent, name, None), (new_parent, new_name, number)])

    def _sync(self, number: int) -> None:
        inode = self.inodes[number]
        inode.synced = bytes(inode.data)
        inode.unsynced.clear()
        kept = []
        for change in self.unsynced_names:
            if number not in {each[0] for each in change}:
                kept.append(change)
                continue
            for parent, name, child in change:
                _set(self.inodes[parent].synced_names, name, child)
        self.unsynced_names = kept

    def _change(self, change: Change) -> None:
        for parent, name, number in change:
            _set(self.inodes[parent].names, name, number)
        self.unsynced_names.append(change)


def write_left(left: Left, folder: Path) -> None:
    """Write what is left into an empty folder."""
    for path, (kind, mode, content) in left.items():
        place = folder / path.lstrip("/")
        if kind == "folder":
            place.mkdir()
        elif kind == "link":
            place.symlink_to(content.decode())
        else:
            place.write_bytes(content)
        if kind != "link":
            place.chmod(mode)


def _set(names: dict[str, int], name: str, number: int | None) -> None:
    if number is None:
        names.pop(name, None)
    else:
        names[name] = number


def _apply(data: bytearray, offset: int, written: bytes) -> None:
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(written)] = written


def _resize(data: bytearray, size: int) -> None:
    del data[size:]
    data.extend(bytes(size - len(data)))


def _content(inode: Inode, loss: Loss, rng: random.Random) -> bytes:
    data = bytearray(inode.synced)
    if loss != "random":
        return bytes(data)
    for kind, place, written in inode.unsynced:
        chance = rng.random()
        if chance < 0.4:
            continue
        if kind == "size":
            _resize(data, place)
        elif chance < 0.7:
            sectors = len(written) // SECTOR
            _apply(data, place, written[: SECTOR * rng.randint(0, sectors)])
        else:
            _apply(data, place, written)
    return bytes(data)
