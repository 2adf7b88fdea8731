"""Checkpoints as safetensors: model, optimiser and progress in one file, written whole or not at all."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from isthmus.data.files import write_atomically


class CheckpointError(Exception):
    """A checkpoint that is damaged or belongs to another run."""


@dataclass(frozen=True)
class Progress:
    """The state of a run: epochs done, the mean loss of each, and the name of the run it belongs to."""

    run: str
    epochs_done: int
    losses: tuple[float, ...]


def save_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write model, optimiser and progress to ``path``. Raises DiskFull; the last checkpoint is then kept."""
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    metadata = {"run": progress.run, "epochs_done": str(progress.epochs_done), "losses": json.dumps(progress.losses)}
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, save(contiguous, metadata))


def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, run: str) -> Progress | None:
    """Restore module and optimiser in place and return the progress; return None if there is no file.

    Raises CheckpointError if the file belongs to another run or is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("run") != run:
                raise CheckpointError(
                    f"{path.name} belongs to another run ({metadata.get('run')}, not {run}): its configuration or data "
                    "differ. Remove it to start again, or use another folder."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises its own untyped errors on damage
        raise CheckpointError(f"{path.name} is damaged ({error}). Remove it to start again.") from error
    module.load_state_dict(_under(tensors, "model."))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for key, value in _under(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if (
            value.shape == parameter.shape
        ):  # in the parameter's memory layout: fused optimisers walk both in memory order
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        states.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(run, int(metadata["epochs_done"]), tuple(json.loads(metadata["losses"])))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def state_hash(states: Iterable[nn.Module]) -> str:
    """Return 16 hex digits over all weights: the identity of a model in cache keys."""
    import hashlib

    digest = hashlib.sha256()
    for module in states:
        for key, value in module.state_dict().items():
            digest.update(key.encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()[:16]
