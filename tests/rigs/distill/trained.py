"""A release that is really trained, as small as real networks allow: everything fits together, accuracy is poor."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from isthmus.data.layouts.listing import read_listing
from isthmus.data.transforms import InputSpec
from isthmus.demo.clients import choose_clients
from isthmus.distill.prepare import begin_release
from isthmus.distill.recipes import Recipe, TrainConfig, smoke
from isthmus.distill.release import Release
from isthmus.distill.student.base import make_base, make_student
from isthmus.distill.teacher.teach import cache_teacher_outputs, train_teacher

RATIOS = (1.0, 2.0)
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A release, the data set behind it, and each client's clips by name."""

    release: Path
    data: Path
    clients: Mapping[str, Sequence[str]]
    label_of: Mapping[str, str]
    public_clips: int


def tiny_loop_recipe(classes: tuple[str, ...], dataset: Literal["crema-d", "ave"] = "crema-d") -> Recipe:
    """Return a recipe of one epoch, on clips of one second."""
    base = smoke(dataset, classes)
    once = TrainConfig(epochs=1, batch_size=16, schedule="constant", augment=False)
    return dataclasses.replace(
        base,
        name="tiny",
        input=InputSpec(
            duration_s=1.0,
            spectrogram_bins=32,
            spectrogram_columns=32,
            frame_px=32,
            stored_px=36,
            frames_stored=2,
            frames_used=1,
        ),
        teacher_trunk="resnet18-quarter",
        student_trunk="resnet18-quarter",
        feature_width=128,
        teacher=dataclasses.replace(base.teacher, audio=once, visual=once, head=once),
        all_distill=once,
        personalise=dataclasses.replace(base.personalise, train=once, rounds=1, samples_per_row=4),
        heads=once,
        ratios=RATIOS,
    )


def train_release(root: Path, data: Path, recipe: Recipe) -> Trained:
    """Train a release on a data set, without the clips of its clients."""
    listing = read_listing(data)
    split = choose_clients(listing, data)
    release: Release = begin_release(root, listing, recipe, split, progress=False)
    train_teacher(release, seed=0, device=_CPU)
    cache_teacher_outputs(release, _CPU)
    make_student(release, 0, _CPU)
    make_base(release, _CPU)
    label_of = {ref.name: listing.classes[ref.label] for ref in listing.refs if ref.label is not None}
    return Trained(release.root, data, split.clients, label_of, len(split.public))
