"""A public set's class probabilities in shards: a folder of memory-mapped arrays, for a set that one machine would not
hold.

shards.json                     classes, and of each shard its samples and the SHA-256 of its file
00000.npy, 00001.npy, ...       probabilities (M, C) of one shard, float16 or float32
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np

from isthmus.data.files import read_text, replaced, write_atomically
from isthmus.distill.selection.sharded import Probabilities

MANIFEST: Final = "shards.json"
MAX_SHARDS: Final = 100_000
_DTYPES: Final = ("float16", "float32")


class ShardsError(Exception):
    """A folder of shards that is missing, damaged, or another one than expected. The message says what to do."""


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

    def shard(self, number: int) -> Probabilities:
        """Map a shard into memory. Its file is compared with its hash once per process.

        Raises ShardsError if the file is missing, damaged or another one.
        """
        path = self.folder / _name(number)
        another = ShardsError(f"{path} is damaged, or of another set: copy it to this machine again")
        try:
            status = path.stat()
            if _hash(path, status.st_size, status.st_mtime_ns) != self.hashes[number]:
                raise another  # numpy never sees a file that was not written as a shard.
            shard: Probabilities = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ShardsError(f"{path} cannot be read ({error}): copy it to this machine again") from error
        if shard.shape != (self.sizes[number], self.classes):
            raise another
        return shard


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
        status = path.stat()
        sizes.append(len(shard))
        hashes.append(_hash(path, status.st_size, status.st_mtime_ns))
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


@lru_cache(maxsize=MAX_SHARDS)
def _hash(path: Path, size_bytes: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
