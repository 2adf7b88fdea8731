"""Learns a task's head, then its prompts for one gamma after another: more prompts start from fewer.

Iterative prompt learning of OTAS (INFOCOM 2024): 4 prompts per layer start from the 2 learned ones, and 8 from the 4.
The backbone does not change. Where we differ: the head is learned first, at gamma 0, and then does not change either,
because one head must serve every gamma of its task. The prompts are learned for this head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.tasks.task import PromptMode, TaskWeights
from isthmus.data.cache.keys import digest
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.distill.recipes import TrainConfig
from isthmus.distill.training.checkpoint import state_hash
from isthmus.distill.training.loop import EpochReport, SeededDataset, fit

HEAD: Final = TrainConfig(epochs=30, batch_size=256, optimizer="adamw", learning_rate=0.01, schedule="cosine")
PROMPTS: Final = TrainConfig(epochs=50, batch_size=32, optimizer="adamw", learning_rate=0.001, schedule="cosine")
"""Batch size and epochs are the paper's. The paper's learning rate is 0.002 with an unnamed optimiser. With AdamW that
rate reduced the accuracy of the CIFAR-10 ViT (docs/log.md)."""
CROP_PADDING_SHARE: Final = 1 / 8
"""Training crops are shifted by at most this share of the picture's side."""
FEATURES_BATCH: Final = 64

OnEpoch = Callable[[str, EpochReport], None]
"""Called with what is being learned ("head", "prompts 4") and the report of an epoch."""


@dataclass(frozen=True)
class PromptConfig:
    """How to learn prompts. ``gammas`` are the numbers of prompts per layer, ascending."""

    gammas: tuple[int, ...] = (2, 4, 8)
    mode: PromptMode = "append"
    head: TrainConfig = HEAD
    prompts: TrainConfig = PROMPTS
    seed: int = 0

    def __post_init__(self) -> None:
        if any(gamma < 1 for gamma in self.gammas) or list(self.gammas) != sorted(set(self.gammas)):
            raise ValueError(f"gammas {self.gammas}: they must be above 0 and ascend")


def learn_task(
    model: ElasticViT,
    pixels: PixelSpec,
    labelled: LabelledImages,
    classes: int,
    config: PromptConfig,
    *,
    folder: Path,
    device: torch.device,
    on_epoch: OnEpoch = lambda _what, _report: None,
) -> TaskWeights:
    """Learns the head and prompts of a task. After an interruption, the same call resumes from ``folder``.

    Raises ValueError for labels beyond ``classes`` and pictures of another size, TrainingDiverged, CheckpointError
    if the folder belongs to another run, and DiskFull.
    """
    side = model.image_px
    if labelled.pictures_NHWC.shape[1:] != (side, side, 3):
        raise ValueError(f"pictures of shape {labelled.pictures_NHWC.shape[1:]}; the model reads {(side, side, 3)}")
    if labelled.labels_N.min() < 0 or labelled.labels_N.max() >= classes:
        raise ValueError(f"labels from {labelled.labels_N.min()} to {labelled.labels_N.max()} for {classes} classes")
    model = model.to(device).eval().requires_grad_(False)
    key = digest([state_hash([model]), repr(config), repr(pixels), labelled.digest(), str(classes)])[:16]
    head = learn_head(
        model,
        pixels,
        labelled,
        classes,
        config,
        checkpoint=folder / "head.safetensors",
        key=key,
        device=device,
        on_epoch=on_epoch,
    )
    learned: dict[int, npt.NDArray[np.float32]] = {}
    before_LGD: Tensor | None = None
    tokens_LND = mean_tokens(model, pixels, labelled, device)
    for gamma in config.gammas:
        prompted = PromptedTask(model, head, first_prompts(tokens_LND, gamma, before_LGD), config.mode)
        learn_prompts(
            prompted,
            pixels,
            labelled,
            config,
            checkpoint=folder / f"prompts-{gamma}.safetensors",
            key=key,
            device=device,
            on_epoch=on_epoch,
        )
        before_LGD = prompted.prompts_LGD.detach()
        learned[gamma] = before_LGD.cpu().numpy().copy()
    return TaskWeights(head.weight.detach().cpu().numpy().copy(), head.bias.detach().cpu().numpy().copy(), learned)


def learn_prompts(
    prompted: "PromptedTask",
    pixels: PixelSpec,
    labelled: LabelledImages,
    config: PromptConfig,
    *,
    checkpoint: Path | None,
    key: str,
    device: torch.device,
    on_epoch: OnEpoch = lambda _what, _report: None,
) -> None:
    """Learns the prompts of ``prompted`` from where they are. ``key`` names model, configuration and pictures.

    Raises TrainingDiverged, DiskFull, and CheckpointError if the checkpoint belongs to another run.
    """
    what = f"prompts {prompted.prompts_LGD.shape[1]}"
    fit(
        prompted,
        Pictures(labelled, pixels, augment=config.prompts.augment, seed=config.seed),
        lambda batch: functional.cross_entropy(
            prompted(batch[0]), batch[1], label_smoothing=config.prompts.label_smoothing
        ),
        config.prompts,
        seed=config.seed,
        run=f"{what} {key}",
        checkpoint=checkpoint,
        device=device,
        on_epoch=_named(what, on_epoch),
    )


def first_prompts(tokens_LND: Tensor, gamma: int, before_LGD: Tensor | None) -> Tensor:
    """Returns initial prompts (L, gamma, D): the prompts learned for a smaller gamma, then averages of tokens.

    Each average is over every gamma-th token of the layer's own input. Where we differ: VPT (Jia et al. 2022) starts
    from small random numbers. A block normalises these to the size of a usual token, so they cost accuracy until they
    are unlearned. An average token resembles what attention has already.
    Raises ValueError if there are more earlier prompts than ``gamma``.
    """
    if before_LGD is not None and before_LGD.shape[1] > gamma:
        raise ValueError(f"{before_LGD.shape[1]} earlier prompts are more than {gamma}")
    tokens = tokens_LND.shape[1]
    prompts_LGD = torch.stack([tokens_LND[:, first % tokens :: gamma].mean(dim=1) for first in range(gamma)], dim=1)
    if before_LGD is not None:
        prompts_LGD[:, : before_LGD.shape[1]] = before_LGD
    return prompts_LGD


@torch.no_grad()
def mean_tokens(model: ElasticViT, pixels: PixelSpec, labelled: LabelledImages, device: torch.device) -> Tensor:
    """Returns the input of each layer at gamma 0 without protected tokens, averaged over some pictures: (L, N, D)."""
    standard = pixels.standardise(labelled.pictures_NHWC[:FEATURES_BATCH])
    return torch.stack(
        [tokens_BND.mean(dim=0) for tokens_BND in model.layer_tokens(torch.from_numpy(standard).to(device))]
    )


class PromptedTask(nn.Module):
    """Maps pictures to logits at one gamma. Its only parameters are the prompts.

    Model and head are not submodules, so checkpoints and optimisers contain only the prompts.
    """

    def __init__(self, model: ElasticViT, head: nn.Linear, prompts_LGD: Tensor, mode: PromptMode):
        super().__init__()
        self.prompts_LGD = nn.Parameter(prompts_LGD)
        self.mode = mode
        self._held = (model, head)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        model, head = self._held
        gamma = self.prompts_LGD.shape[1]
        if self.mode == "append":
            features_BD = model.features(images_BCHW, gamma, prompts_BLGD=self.prompts_LGD[None])
        else:
            keys_values = model.prompt_keys_values(self.prompts_LGD)
            features_BD = model.features(images_BCHW, gamma, prompts_BLAHGd=keys_values[None])
        logits_BC: Tensor = head(features_BD)
        return logits_BC


class Pictures(SeededDataset[Sequence[Tensor]]):
    """Standardised pictures and labels. Augmentation shifts by up to an eighth of the side and mirrors at random."""

    def __init__(self, labelled: LabelledImages, pixels: PixelSpec, *, augment: bool, seed: int):
        super().__init__(len(labelled), seed)
        self._labelled, self._pixels, self._augment = labelled, pixels, augment

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        picture_HWC = self._labelled.pictures_NHWC[index]
        if self._augment:
            picture_HWC = _shifted(picture_HWC, rng)
        standard_CHW = self._pixels.standardise(picture_HWC[None])[0]
        return torch.from_numpy(standard_CHW), torch.tensor(self._labelled.labels_N[index])


class Rows(SeededDataset[Sequence[Tensor]]):
    """Precomputed features and their labels."""

    def __init__(self, features_ND: Tensor, labels_N: Tensor, seed: int):
        super().__init__(len(labels_N), seed)
        self._rows = (features_ND, labels_N)

    def sample(self, index: int, rng: np.random.Generator) -> Sequence[Tensor]:
        return tuple(rows[index] for rows in self._rows)


@torch.no_grad()  # not inference mode: training the head must be able to save these tensors for backward
def all_features(model: ElasticViT, pixels: PixelSpec, labelled: LabelledImages, device: torch.device) -> Tensor:
    """Returns the features (N, D) at gamma 0, on the host."""
    batches = []
    for first in range(0, len(labelled), FEATURES_BATCH):
        standard = pixels.standardise(labelled.pictures_NHWC[first : first + FEATURES_BATCH])
        batches.append(model.features(torch.from_numpy(standard).to(device)).cpu())
    return torch.cat(batches)


def learn_head(
    model: ElasticViT,
    pixels: PixelSpec,
    labelled: LabelledImages,
    classes: int,
    config: PromptConfig,
    *,
    checkpoint: Path | None,
    key: str,
    device: torch.device,
    on_epoch: OnEpoch = lambda _what, _report: None,
) -> nn.Linear:
    """Learns one linear layer on features at gamma 0, which are computed once. Raises as ``learn_prompts``."""
    head = nn.Linear(model.width, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    features_ND = all_features(model, pixels, labelled, device)
    fit(
        head,
        Rows(features_ND, torch.from_numpy(labelled.labels_N), config.seed),
        lambda batch: functional.cross_entropy(head(batch[0]), batch[1]),
        config.head,
        seed=config.seed,
        run=f"head {key}",
        checkpoint=checkpoint,
        device=device,
        on_epoch=_named("head", on_epoch),
    )
    return head.requires_grad_(False)


def _named(what: str, on_epoch: OnEpoch) -> Callable[[EpochReport], None]:
    return lambda report: on_epoch(what, report)


def _shifted(picture_HWC: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    padding = max(1, round(picture_HWC.shape[0] * CROP_PADDING_SHARE))
    top, left = rng.integers(0, 2 * padding + 1, 2)
    down, right = int(top) - padding, int(left) - padding
    shifted = np.zeros_like(picture_HWC)  # np.pad takes several times as long
    into_rows, from_rows = _overlap(down, len(picture_HWC))
    into_columns, from_columns = _overlap(right, picture_HWC.shape[1])
    shifted[into_rows, into_columns] = picture_HWC[from_rows, from_columns]
    return shifted[:, ::-1] if rng.random() < 0.5 else shifted


def _overlap(by: int, length: int) -> tuple[slice, slice]:
    """Returns (target, source) slices of the visible part of a picture that is shifted by ``by`` pixels."""
    return slice(max(0, -by), length - max(0, by)), slice(max(0, by), length - max(0, -by))
