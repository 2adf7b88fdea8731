"""The recipe of a release that trains in seconds."""

import dataclasses

from isthmus.data.transforms import InputSpec
from isthmus.distill.recipes import Recipe, TrainConfig, smoke

CLASSES = ("NEU", "HAP", "SAD")


def wide_recipe() -> Recipe:
    """Return the tiny recipe with whole ResNet18s, as every version knows them, and features of their width."""
    return dataclasses.replace(tiny_recipe(), teacher_trunk="resnet18", student_trunk="resnet18", feature_width=512)


def tiny_recipe(classes: tuple[str, ...] = CLASSES) -> Recipe:
    """Return the smoke recipe with smaller sizes and fewer epochs."""
    base = smoke("crema-d", classes)
    sgd = TrainConfig(epochs=3, batch_size=12, learning_rate=1e-3, schedule="constant", augment=False)
    return dataclasses.replace(
        base,
        name="tiny",
        input=InputSpec(
            spectrogram_bins=32, spectrogram_columns=32, frame_px=32, stored_px=36, frames_stored=2, frames_used=1
        ),
        teacher_trunk="resnet18-quarter",
        student_trunk="resnet18-quarter",
        feature_width=128,
        all_distill=dataclasses.replace(sgd, epochs=1),
        personalise=dataclasses.replace(base.personalise, train=sgd, rounds=2, samples_per_row=3, min_cluster=3),
        heads=dataclasses.replace(sgd, epochs=2),
        ratios=(1.0, 2.0),
    )
