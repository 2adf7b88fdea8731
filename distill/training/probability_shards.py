"""A public set's class probabilities in shards, memory-mapped: rows of one array, such as a release's, or a folder of
arrays for a set that one machine would not hold.

shards.json                     classes, and of each shard its samples and the SHA-256 of its rows
00000.npy, 00001.npy, ...       probabilities (M, C) of one shard, float16 or float32
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.lib.format import open_memmap

from isthmus.data.files import read_text, replaced, write_atomically
from isthmus.distill.selection.sharded import Probabilities

MANIFEST: Final = "shards.json"
MAX_SHARDS: Final = 100_000
_DTYPES: Final = ("float16", "float32")


class ShardsError(Exception):
    """A folder of shards that is missing, damaged, or another one than expected. The message says what to do."""


@dataclass(frozen=True)
class Shard:
    """Rows of a memory-mapped array, and the SHA-256 of their bytes. Another machine may have them at the same path."""

    path: Path
    first: int
    samples: int
    classes: int
    sha256: str

    def read(self) -> Probabilities:
        """Map the rows into memory. They are compared with their hash once per process.

        Raises ShardsError if the file is missing, damaged or another one.
        """
        rows: Probabilities = _mapped(self.path)[self.first : self.first + self.samples]
        if rows.shape != (self.samples, self.classes) or _sha256(self.path, self.first, self.samples) != self.sha256:
            raise ShardsError(f"{self.path} is damaged, or of another set: copy it to this machine again")
        return rows


class ShardsOfFiles(Protocol):
    """A set in shards, each of which says where it is."""

    @property
    def sizes(self) -> Sequence[int]:
        """The number of samples of each shard."""

    @property
    def classes(self) -> int: ...

    def shard(self, number: int) -> Shard:
        """Say where a shard is. Raises ShardsError if it cannot be read here."""


@dataclass(frozen=True)
class ShardFiles:
    """An opened folder of shards. A shard is read only when it is asked for."""

    folder: Path
    classes: int
    sizes: tuple[int, ...]
    hashes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all shards: two folders with the same one hold the same samples in the same order."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    def shard(self, number: int) -> Shard:
        return Shard(self.folder / _name(number), 0, self.sizes[number], self.classes, self.hashes[number])


@dataclass(frozen=True)
class CutArray:
    """One array of probabilities (N, C), cut into shards of ``shard_samples``; the last one may be smaller."""

    path: Path
    samples: int
    classes: int
    shard_samples: int

    @staticmethod
    def open(path: Path, shard_samples: int) -> "CutArray":
        """Open an array. Raises ShardsError if the file holds none, and ValueError for shards of no samples."""
        if shard_samples < 1:
            raise ValueError(f"shards of {shard_samples} samples; there must be at least 1 in each")
        array = _mapped(path)
        if not len(array):
            raise ShardsError(f"{path} holds no samples")
        return CutArray(path, len(array), array.shape[1], shard_samples)

    @property
    def sizes(self) -> Sequence[int]:
        return [min(self.shard_samples, self.samples - first) for first in range(0, self.samples, self.shard_samples)]

    def shard(self, number: int) -> Shard:
        """Say where a shard is. Its rows are hashed once per process."""
        first, samples = number * self.shard_samples, self.sizes[number]
        return Shard(self.path, first, samples, self.classes, _sha256(self.path, first, samples))


def write_shards(folder: Path, shards: Iterable[Probabilities]) -> ShardFiles:
    """Write each array as a shard, and the manifest last. Returns the opened folder.

    Raises ValueError for no shard, an empty one, another width than the first's, or a type other than float16 and
    float32; FileExistsError if the folder holds shards already.
    """
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} holds shards already: remove it, or choose another folder")
    sizes: list[int] = []
    hashes: list[str] = []
    classes = 0
    for number, shard in enumerate(shards):
        if shard.ndim != 2 or not len(shard) or shard.shape[1] != (classes or shard.shape[1]):
            raise ValueError(
                f"shard {number} of shape {shard.shape}: all shards have one width and at least one sample"
            )
        if shard.dtype.name not in _DTYPES:
            raise ValueError(f"shard {number} holds {shard.dtype.name}; it must be one of {', '.join(_DTYPES)}")
        classes = shard.shape[1]
        path = folder / _name(number)
        with replaced(path) as part, part.open("wb") as file:
            np.save(file, shard, allow_pickle=False)
        sizes.append(len(shard))
        hashes.append(_sha256(path, 0, len(shard)))
    if not sizes:
        raise ValueError("there is no shard to write")
    listed = [{"samples": samples, "sha256": hashed} for samples, hashed in zip(sizes, hashes, strict=True)]
    write_atomically(folder / MANIFEST, json.dumps({"classes": classes, "shards": listed}, indent=1) + "\n")
    return ShardFiles(folder, classes, tuple(sizes), tuple(hashes))


def open_shards(folder: Path) -> ShardFiles:
    """Open a folder that ``write_shards`` wrote. Raises ShardsError if it holds none, or a damaged list of them."""
    path = folder / MANIFEST
    try:
        raw = json.loads(read_text(path, limit_bytes=MAX_SHARDS * 200))
        listed = raw["shards"]
        classes = int(raw["classes"])
        sizes = tuple(int(shard["samples"]) for shard in listed)
        hashes = tuple(str(shard["sha256"]) for shard in listed)
    except FileNotFoundError as error:
        raise ShardsError(f"{folder} holds no shards: write_shards makes them, and {MANIFEST} with them") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardsError(f"{path} cannot be read ({error}): copy the folder to this machine again") from error
    if not 0 < len(sizes) <= MAX_SHARDS or min(sizes) < 1 or classes < 1:
        raise ShardsError(f"{path} lists {len(sizes)} shards of {classes} classes; that is no set of samples")
    return ShardFiles(folder, classes, sizes, hashes)


def _name(number: int) -> str:
    return f"{number:05d}.npy"


def _mapped(path: Path) -> np.memmap[Any, Any]:
    """Map an array of rows into memory. Nothing is unpickled. Raises ShardsError."""
    try:
        array: np.memmap[Any, Any] = open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ShardsError(f"{path} cannot be read ({error}): copy it to this machine again") from error
    if array.ndim != 2 or not array.flags.c_contiguous or array.dtype.name not in _DTYPES:
        raise ShardsError(f"{path} holds no rows of probabilities: copy it to this machine again")
    return array


def _sha256(path: Path, first: int, samples: int) -> str:
    """Return the hash of some rows. Raises ShardsError."""
    try:
        status = path.stat()
    except OSError as error:
        raise ShardsError(f"{path} cannot be read ({error}): copy it to this machine again") from error
    return _hashed(path, first, samples, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=MAX_SHARDS)
def _hashed(path: Path, first: int, samples: int, file_bytes: int, changed_ns: int) -> str:
    rows = _mapped(path)[first : first + samples]
    return hashlib.sha256(rows.reshape(-1).view(np.uint8).data).hexdigest()
