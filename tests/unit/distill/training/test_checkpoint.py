"""A stopped run ends like an uninterrupted one; a full disk loses nothing; a foreign checkpoint is refused."""

import errno
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.data.files import DiskFull
from isthmus.distill.recipes import TrainConfig
from isthmus.distill.training.checkpoint import CheckpointError, state_hash
from isthmus.distill.training.loop import EpochReport, SeededDataset, TrainingDiverged, fit, learning_rate


class Noisy(SeededDataset[Sequence[Tensor]]):
    """Samples on a line, with noise drawn from each sample's own generator."""

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        x = torch.tensor([index / len(self), float(rng.normal())], dtype=torch.float32)
        return x, 3 * x.sum()


class Stopped(Exception):
    pass


def train(config: TrainConfig, *, checkpoint: Path | None = None, stop_after: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)  # as the encoders are laid out
    module = nn.Sequential(
        nn.Unflatten(1, (2, 1, 1)), convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1)
    )

    def on_epoch(report: EpochReport) -> None:
        if report.epoch == stop_after:
            raise Stopped

    fit(
        module,
        Noisy(20, seed=3),
        lambda batch: (module(batch[0]).squeeze(1) - batch[1]).square().mean(),
        config,
        seed=3,
        run="line",
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        device=torch.device("cpu"),
    )
    return module


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, optimizer, stop_after):
    config = TrainConfig(epochs=5, batch_size=6, optimizer=optimizer, learning_rate=0.05, schedule="cosine")
    whole = train(config)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        train(config, checkpoint=path, stop_after=stop_after)
    assert state_hash([train(config, checkpoint=path)]) == state_hash([whole])


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    config = TrainConfig(epochs=3, batch_size=6, learning_rate=0.05, schedule="constant")
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        train(config, checkpoint=path, stop_after=1)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull, match="disk is full"):
        train(config, checkpoint=path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    assert state_hash([train(config, checkpoint=path)]) == state_hash([train(config)])


@pytest.mark.parametrize("damage", ["foreign", "truncated"])
def test_a_checkpoint_that_is_not_this_runs_is_refused(tmp_path, damage):
    config = TrainConfig(epochs=2, batch_size=6, schedule="constant")
    path = tmp_path / "checkpoint.safetensors"
    train(config, checkpoint=path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"run":"line"', b'"run":"lime"') if damage == "foreign" else content[:-9])
    with pytest.raises(CheckpointError, match="another run" if damage == "foreign" else "damaged"):
        train(config, checkpoint=path)


def test_a_loss_that_is_no_number_stops_the_run():
    module = nn.Linear(2, 1)
    with pytest.raises(TrainingDiverged, match="learning rate"):
        fit(
            module,
            Noisy(8, seed=0),
            lambda batch: module(batch[0]).sum() * float("nan"),
            TrainConfig(epochs=1, batch_size=4, schedule="constant"),
            seed=0,
            run="nan",
            device=torch.device("cpu"),
        )


def test_the_papers_schedule_drops_tenfold_at_epoch_70():
    config = TrainConfig(epochs=100)
    assert learning_rate(config, 69.9) == pytest.approx(1e-3)
    assert learning_rate(config, 70.0) == pytest.approx(1e-4)
