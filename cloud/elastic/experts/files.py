"""A model with experts as files: a folder that is named wherever a model's file is named.

    experts.json               the layers with experts, their sizes, and the length and SHA-256 of each file
    backbone.safetensors       all other weights, with timm's names
    config.json                how the backbone is built and reads pictures (model/configuration.py)
    experts/LAYER-EXPERT.safetensors    fc1.weight, fc1.bias, fc2.weight, fc2.bias of one expert

Each expert is a file, so that only those of registered tasks are read. A file is checked against its length before it
is read, and against its hash and shapes before it is used. No pickle, no code.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from isthmus.cloud.elastic.experts.layer import Expert
from isthmus.cloud.elastic.scheduling.levels import MAX_EXPERTS
from isthmus.cloud.elastic.tasks.router import ExpertsShape
from isthmus.data.files import read_text, write_atomically

MANIFEST: Final = "experts.json"
BACKBONE: Final = "backbone.safetensors"
FORMAT: Final = 1
MAX_BYTES: Final = 8 << 20
MAX_WIDTH: Final = 1 << 16
MAX_LAYERS: Final = 256
_HEADER_BYTES: Final = 4_096
"""Room for the header of an expert's file, beside its weights in float32."""


class ExpertsError(ValueError):
    """The files of a model with experts cannot be used. The message names the file."""


@dataclass(frozen=True)
class ExpertFiles:
    """What ``experts.json`` says. ``blocks`` are the positions of the blocks with experts, ascending.

    ``units`` is the hidden width of the dense MLPs that the experts were made of, ``hidden`` that of an expert.
    ``hashes`` holds (length in bytes, SHA-256) by block and expert.
    """

    folder: Path
    blocks: tuple[int, ...]
    width: int
    hidden: int
    units: int
    shape: ExpertsShape
    hashes: Mapping[tuple[int, int], tuple[int, str]]

    @property
    def identity(self) -> str:
        """16 hex digits over the weights of all experts and the backbone: the model's identity in a profile."""
        digest = hashlib.sha256(repr(sorted(self.hashes.items())).encode())
        digest.update((self.folder / BACKBONE).read_bytes())
        return digest.hexdigest()[:16]

    @property
    def expert_bytes(self) -> int:
        """The size of one expert in float32."""
        return 4 * (2 * self.width * self.hidden + self.width + self.hidden)

    def path(self, layer: int, expert: int) -> Path:
        """Returns the file of an expert. ``layer`` counts the layers with experts."""
        return self.folder / "experts" / f"{self.blocks[layer]}-{expert}.safetensors"

    def missing(self) -> list[str]:
        """Returns what is wrong with the files without reading them: those that are missing or have another length."""
        found = []
        for layer, block in enumerate(self.blocks):
            for expert in range(self.shape.experts):
                path = self.path(layer, expert)
                if not path.is_file():
                    found.append(f"{path.name} is missing")
                elif path.stat().st_size != self.hashes[block, expert][0]:
                    found.append(f"{path.name} has {path.stat().st_size} bytes, not {self.hashes[block, expert][0]}")
        return found

    def load(self, layer: int, expert: int) -> Expert:
        """Reads one expert, in float32. Raises ExpertsError if its file is missing, cut, or not the one named."""
        path = self.path(layer, expert)
        length, digest = self.hashes[self.blocks[layer], expert]
        try:
            with path.open("rb") as file:
                data = file.read(length + 1)
        except OSError as error:
            why = f"{path.name} cannot be read ({error.strerror})"
            raise ExpertsError(f"{why}; copy the model's folder again") from error
        if len(data) != length or hashlib.sha256(data).hexdigest() != digest:
            raise ExpertsError(f"{path.name} is not the file that {MANIFEST} names; copy the model's folder again")
        try:
            tensors = safetensors.torch.load(data)
            made = _empty(self.width, self.hidden)
            if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
                raise ExpertsError(f"{path.name} does not hold float32 weights")
            made.load_state_dict(tensors, assign=True)
        except (SafetensorError, RuntimeError) as error:
            raise ExpertsError(f"{path.name} does not hold an expert of this model: {error}") from error
        return made.requires_grad_(False)


def beside(weights: Path) -> ExpertFiles | None:
    """Returns the experts of a backbone, if ``experts.json`` is beside its file; else None. Raises ExpertsError."""
    path = weights.parent / MANIFEST
    return read(path.parent) if weights.name == BACKBONE and path.is_file() else None


def read(folder: Path) -> ExpertFiles:
    """Reads ``experts.json`` of a folder. Raises ExpertsError if it is missing or impossible."""
    path = folder / MANIFEST
    try:
        raw = json.loads(read_text(path, limit_bytes=MAX_BYTES))
    except FileNotFoundError as error:
        raise ExpertsError(f"{folder} holds no {MANIFEST}; make a model with 'isthmus elastic experts'") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ExpertsError(f"{path.name} cannot be read: {error}") from error
    try:
        if raw["format"] != FORMAT:
            raise ExpertsError(f"{path.name} has format {raw['format']!r}; this version reads format {FORMAT}")
        blocks = tuple(int(block) for block in raw["blocks"])
        shape = ExpertsShape(len(blocks), int(raw["experts"]), int(raw["k"]))
        width, hidden, units = (int(raw[name]) for name in ("width", "hidden", "units"))
        hashes = {
            (block, expert): _named(raw["files"][f"{block}-{expert}"])
            for block in blocks
            for expert in range(min(shape.experts, MAX_EXPERTS))
        }
    except ExpertsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExpertsError(f"{path.name} is damaged: {error!r}") from error
    if (
        list(blocks) != sorted(set(blocks))
        or not blocks
        or not 0 <= blocks[0] <= blocks[-1] < MAX_LAYERS
        or not 1 <= shape.k <= shape.experts <= MAX_EXPERTS
        or not all(1 <= side <= MAX_WIDTH for side in (width, hidden, units))
    ):
        raise ExpertsError(f"{path.name} names impossible experts: {shape}, blocks {list(blocks)[:20]}")
    found = ExpertFiles(folder, blocks, width, hidden, units, shape, hashes)
    if any(length > found.expert_bytes + _HEADER_BYTES for length, _ in hashes.values()):
        raise ExpertsError(f"{path.name} names files larger than an expert of {found.expert_bytes} bytes")
    return found


def write(
    folder: Path,
    blocks: Sequence[int],
    layers: Sequence[Sequence[Expert]],
    backbone: Mapping[str, Tensor],
    *,
    units: int,
    k: int,
    config: str,
) -> ExpertFiles:
    """Writes a model's folder: experts first, the manifest last. ``config`` is the text of config.json.

    ``layers[m]`` holds the experts of block ``blocks[m]``. Raises DiskFull.
    """
    files: dict[str, dict[str, Any]] = {}
    for block, experts in zip(blocks, layers, strict=True):
        for number, expert in enumerate(experts):
            tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in expert.state_dict().items()}
            data = safetensors.torch.save(tensors)
            write_atomically(folder / "experts" / f"{block}-{number}.safetensors", data)
            files[f"{block}-{number}"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    plain = {name: tensor.detach().cpu().float().contiguous() for name, tensor in backbone.items()}
    write_atomically(folder / BACKBONE, safetensors.torch.save(plain))
    write_atomically(folder / "config.json", config)
    first: Any = layers[0][0]
    raw = {
        "format": FORMAT,
        "blocks": list(blocks),
        "experts": len(layers[0]),
        "k": k,
        "width": first.fc1.in_features,
        "hidden": first.fc1.out_features,
        "units": units,
        "files": files,
    }
    write_atomically(folder / MANIFEST, json.dumps(raw, indent=1))
    return read(folder)


def _empty(width: int, hidden: int) -> Expert:
    with torch.device("meta"):
        return Expert(width, hidden)


def _named(raw: Any) -> tuple[int, str]:
    length, digest = int(raw["bytes"]), str(raw["sha256"])
    if length < 1 or len(digest) != 64:
        raise ValueError(f"a file of {length} bytes")
    return length, digest
