"""Warmed models as files. A model is a list of named tensors, and each tensor is stored once, by the hash of its bytes.

tensors/<sha256>.safetensors   one tensor, named "tensor"
models/<name>.json             the model's card: its tensors, what it was tuned for, its accuracy
store.json                     what all models have in common: the task, its classes, the reducer

Tensors are written before the card that names them, and each file is written completely or not at all. So an
interrupted write leaves the earlier models intact. Whatever is read is checked against its hash, name, shape and type.
No pickle, no code.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from isthmus.cloud.elastic.scheduling.merge_order import DEFAULT_ORDER, MergeOrder, order_in
from isthmus.cloud.elastic.warm.profiled import Profiled
from isthmus.data.files import write_atomically

FORMAT: Final = 1
MAX_CARD_CHARS: Final = 4 << 20
MAX_MODELS: Final = 4_096
TYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Kind = Literal["vanilla", "tuned", "soup"]
ReducerName = Literal["merging", "pruning"]
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")


class StoreError(ValueError):
    """A store or one of its models cannot be used. The message names the file."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a model, as its card describes it."""

    hash: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * TYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Card:
    """A model of the store.

    ``number`` is the reduction number that it was tuned for, or that a soup was made for. ``accuracy`` is by reduction
    number, on a profiling set of ``pictures`` pictures (0: unknown). ``shares`` are those of a soup's members.
    ``heads`` is the number of attention heads. ``seconds`` is what tuning took.
    """

    name: str
    kind: Kind
    number: int
    heads: int
    tensors: Mapping[str, Stored]
    accuracy: Mapping[int, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    pictures: int = 0

    @property
    def bytes(self) -> int:
        """The size of all its tensors, each counted once, including those shared with other models."""
        return sum({stored.hash: stored.bytes for stored in self.tensors.values()}.values())


@dataclass(frozen=True)
class Common:
    """What all models of a store have in common."""

    task: str
    classes: tuple[str, ...]
    reducer: ReducerName = "merging"
    merge_order: MergeOrder = DEFAULT_ORDER


class WarmStore:
    """A store in the folder ``path``. Reading needs no lock, since files are always complete. One process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path, common: Common) -> "WarmStore":
        """Creates a store, or opens an existing one with the same ``common``. Raises StoreError if that differs."""
        store = WarmStore(path)
        if (path / "store.json").exists():
            known = store.common()
            # Models that prune merge nothing, so a store of another order is theirs, too.
            if known != (replace(common, merge_order=known.merge_order) if common.reducer == "pruning" else common):
                raise StoreError(
                    f"{path} holds warmed models of another task, reducer or merge order (task {known.task!r}, "
                    f"{known.reducer}, {known.merge_order}): name another folder"
                )
            return store
        raw = {
            "format": FORMAT,
            "task": common.task,
            "classes": common.classes,
            "reducer": common.reducer,
            "merge_order": common.merge_order,
        }
        write_atomically(path / "store.json", json.dumps(raw, indent=1))
        return store

    def common(self) -> Common:
        """Reads what all models have in common. Raises StoreError if there is no store or it cannot be read."""
        raw = _json(self.path / "store.json", f"{self.path} holds no warmed models; make some with 'warmup run'")
        try:
            if raw["format"] != FORMAT or raw["reducer"] not in ("merging", "pruning"):
                raise StoreError(f"{self.path / 'store.json'} has another format or reducer")
            return Common(str(raw["task"]), tuple(map(str, raw["classes"])), raw["reducer"], order_in(raw))
        except StoreError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.path / 'store.json'} is damaged: {error!r}") from error

    def merge_order(self) -> MergeOrder | None:
        """Returns the order in which the store's models merge; None if they prune, or if there is no store.

        Raises StoreError for a store that cannot be read.
        """
        if not (self.path / "store.json").exists():
            return None
        common = self.common()
        return common.merge_order if common.reducer == "merging" else None

    def names(self) -> list[str]:
        """Returns the names of all models with a card, usable or not."""
        return sorted(path.name.removesuffix(".json") for path in (self.path / "models").glob("*.json"))[:MAX_MODELS]

    def card(self, name: str) -> Card:
        """Reads a model's card. Raises StoreError if it is missing or damaged."""
        path = self.path / "models" / f"{_checked(name)}.json"
        raw = _json(path, f"there is no model {name!r} in {self.path}")
        try:
            if raw["format"] != FORMAT or raw["name"] != name or raw["kind"] not in ("vanilla", "tuned", "soup"):
                raise StoreError(f"{path.name} has another format, or belongs to another model")
            tensors = {str(key): _stored(path, value) for key, value in raw["tensors"].items()}
            return Card(
                name=name,
                kind=raw["kind"],
                number=int(raw["number"]),
                heads=int(raw["heads"]),
                tensors=tensors,
                accuracy={int(number): float(share) for number, share in raw["accuracy"].items()},
                shares={str(member): float(share) for member, share in raw["shares"].items()},
                seconds=float(raw["seconds"]),
                pictures=max(0, int(raw.get("pictures", 0))),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise (
                error if isinstance(error, StoreError) else StoreError(f"{path.name} is damaged: {error!r}")
            ) from error

    def usable(self) -> tuple[dict[str, Card], dict[str, str]]:
        """Returns (cards whose files exist with at least their size, what is wrong with each other model)."""
        good, bad = {}, {}
        for name in self.names():
            try:
                card = self.card(name)
                for stored in card.tensors.values():
                    self._present(stored)
                good[name] = card
            except StoreError as error:
                bad[name] = str(error)
        return good, bad

    def profiled(self) -> Profiled:
        """Returns the accuracies of all usable models. Raises StoreError if there is no profiled model."""
        good, bad = self.usable()
        found = profiled(good.values())
        if not found.accuracy:
            raise StoreError(f"{self.path} holds no profiled model: {'; '.join(bad.values()) or 'it is empty'}")
        return found

    def save(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        kind: Kind,
        number: int,
        heads: int,
        accuracy: Mapping[int, float] | None = None,
        shares: Mapping[str, float] | None = None,
        seconds: float = 0.0,
        pictures: int = 0,
    ) -> Card:
        """Writes or replaces a model. Raises DiskFull; the earlier model is then unchanged."""
        _checked(name)
        stored = {key: self._write(tensor) for key, tensor in tensors.items()}
        card = Card(name, kind, number, heads, stored, dict(accuracy or {}), dict(shares or {}), seconds, pictures)
        self.write_card(card)
        return card

    def write_card(self, card: Card) -> None:
        """Writes or replaces a model's card. Raises DiskFull."""
        raw = {
            "format": FORMAT,
            "name": card.name,
            "kind": card.kind,
            "number": card.number,
            "heads": card.heads,
            "accuracy": {str(number): share for number, share in sorted(card.accuracy.items())},
            "shares": dict(card.shares),
            "seconds": card.seconds,
            "pictures": card.pictures,
            "tensors": {
                key: {"hash": one.hash, "dtype": one.dtype, "shape": list(one.shape)}
                for key, one in card.tensors.items()
            },
        }
        write_atomically(self.path / "models" / f"{card.name}.json", json.dumps(raw, indent=1))

    def remove(self, name: str) -> None:
        """Removes a model's card, if it exists. ``collect`` removes its tensors."""
        (self.path / "models" / f"{_checked(name)}.json").unlink(missing_ok=True)

    def collect(self) -> int:
        """Removes tensors that no card names, for example after an interrupted write. Returns the bytes freed.

        Raises StoreError if a card cannot be read, because the tensors that it names are then unknown.
        """
        named = {stored.hash for name in self.names() for stored in self.card(name).tensors.values()}
        freed = 0
        for path in (self.path / "tensors").glob("*"):
            if path.name.removesuffix(".safetensors") not in named:
                freed += path.stat().st_size
                path.unlink()
        return freed

    def bytes_of(self, cards: Collection[Card]) -> int:
        """Returns the size of these models in bytes; shared tensors count once."""
        every = {one.hash: one.bytes for card in cards for one in card.tensors.values()}
        return sum(every.values())

    def tensor(self, stored: Stored) -> Tensor:
        """Reads and checks one tensor. Raises StoreError, with the file's name, if it is missing, cut or wrong."""
        path = self._present(stored)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor("tensor").clone()
        except Exception as error:  # safetensors raises errors of several types on damage
            raise StoreError(f"{path.name} is not a safetensors file or is damaged: {error}") from error
        if _description(tensor) != (stored.dtype, stored.shape) or _hash(tensor) != stored.hash:
            raise StoreError(f"{path.name} does not hold the weights that its name says")
        return tensor

    def load(self, name: str) -> dict[str, Tensor]:
        """Reads a model's tensors; a tensor that occurs twice is loaded once. Raises StoreError."""
        card, loaded = self.card(name), {}
        for stored in card.tensors.values():
            if stored.hash not in loaded:
                loaded[stored.hash] = self.tensor(stored)
        return {key: loaded[stored.hash] for key, stored in card.tensors.items()}

    def _present(self, stored: Stored) -> Path:
        path = self._path(stored.hash)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise StoreError(f"{path.name} is missing") from error
        if size < stored.bytes:
            raise StoreError(f"{path.name} is truncated: {size} bytes for a tensor of {stored.bytes}")
        return path

    def _path(self, hash: str) -> Path:
        return self.path / "tensors" / f"{hash}.safetensors"

    def _write(self, tensor: Tensor) -> Stored:
        plain = tensor.detach().cpu().contiguous()
        dtype, shape = _description(plain)
        stored = Stored(_hash(plain), dtype, shape)
        try:
            self.tensor(stored)  # it exists already and is intact
        except StoreError:
            write_atomically(self._path(stored.hash), safetensors.torch.save({"tensor": plain}))
        return stored


def _stored(path: Path, raw: Mapping[str, Any]) -> Stored:
    hash, dtype, shape = str(raw["hash"]), str(raw["dtype"]), tuple(map(int, raw["shape"]))
    if not _HASH.fullmatch(hash) or dtype not in TYPES or any(side < 0 for side in shape):
        raise StoreError(f"{path.name} names an impossible tensor: {hash[:70]!r}, {dtype!r}, {list(shape)[:8]}")
    return Stored(hash, dtype, shape)


def _description(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    dtype = next((name for name, known in TYPES.items() if known == tensor.dtype), None)
    if dtype is None:
        raise StoreError(f"tensors of {tensor.dtype} cannot be stored, only {', '.join(TYPES)}")
    return dtype, tuple(tensor.shape)


def _hash(tensor: Tensor) -> str:
    """Returns the SHA-256 of type, shape and bytes."""
    digest = hashlib.sha256(repr(_description(tensor)).encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _json(path: Path, missing: str) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CARD_CHARS + 1)
    except FileNotFoundError as error:
        raise StoreError(missing) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if len(text) > MAX_CARD_CHARS:
        raise StoreError(f"{path.name} has over {MAX_CARD_CHARS} characters")
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise StoreError(f"{path.name} is damaged: {error}") from error


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name[:100]!r} is not a valid name of a model")
    return name


def profiled(cards: Collection[Card]) -> Profiled:
    """Returns the accuracies of the profiled ones among ``cards``.

    Its number of pictures is the smallest of any of them, and 0 if one of them is unknown.
    """
    known = [card for card in cards if card.accuracy]
    pictures = min((card.pictures for card in known), default=0)
    return Profiled({card.name: card.accuracy for card in known}, pictures)
