"""Personalise a student from Python: both halves of the loop in one process, without a network.

    python examples/personalise_from_python.py            # about a minute on two cores
    python examples/personalise_from_python.py --epochs 20   # closer to what a real run trains

A synthetic data set of four invented persons is made; nobody was recorded. Three persons are public, the fourth is the
user. The cloud's half trains a teacher and a base student on the public clips. The device's half makes prototypes of
the user's clips: averaged class probabilities, the only thing a device would send. The cloud's half then picks similar
public clips and distils a personal student on them. With so little training the accuracies say nothing about the
method; docs/results holds the measured ones.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from isthmus import (
    Recipe,
    Wanted,
    accuracy,
    begin_release,
    build_arrays,
    cache_teacher_outputs,
    choose_split,
    distil_round,
    make_crema_d,
    make_prototypes,
    make_student,
    read_listing,
    recipe_for,
    select_round,
    student_outputs,
    train_teacher,
)

USER = "1004"
CPU = torch.device("cpu")


def shortened(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with every training cut to a few epochs."""
    short = dataclasses.replace(recipe.all_distill, epochs=epochs, warmup_epochs=0)
    return dataclasses.replace(
        recipe,
        teacher=dataclasses.replace(recipe.teacher, audio=short, visual=short, head=short),
        all_distill=short,
        personalise=dataclasses.replace(recipe.personalise, train=short, rounds=1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="epochs of every training; default 2")
    parser.add_argument("--takes", type=int, default=2, help="clips of each person and emotion; default 2")
    parser.add_argument("--preset", default="smoke", help="sizes of the networks; 'tiny' takes seconds; default smoke")
    chosen = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_crema_d(root / "data", actors=4, takes=chosen.takes, seed=0, difficulty=0.2, progress=False)
        listing = read_listing(root / "data")
        split = choose_split(listing, private_actors=[USER])
        recipe = shortened(recipe_for(listing, chosen.preset), chosen.epochs)

        # The cloud, once: a release is one folder with the teacher, the public clips and the base student.
        release = begin_release(root / "release", listing, recipe, split, progress=False)
        train_teacher(release, seed=0, device=CPU)
        cache_teacher_outputs(release, CPU)
        make_student(release, 0, CPU)
        base = release.student(0)
        print(f"teacher and base student trained on {len(split.public)} public clips")

        # The device: run the base student on the user's own clips and average its probabilities.
        own = [ref for ref in listing.refs if ref.name in set(split.clients[USER])]
        clips = build_arrays(own, listing.classes, recipe.input, root / "own", progress=False)
        outputs = student_outputs(base, release.teacher_head, clips, CPU)
        prototypes = make_prototypes(outputs.probabilities_NC, seed=0)
        print(f"the device would send {prototypes.values_KC.size} numbers for {len(own)} clips")

        # The cloud, per user: pick similar public clips and distil on them.
        selection = select_round(release, Wanted(prototypes.values_KC, prototypes.sizes_K), round=0, seed=0)
        personal = distil_round(
            release, selection, round=0, rounds=1, seed=0, checkpoint=root / "job.safetensors", device=CPU
        )
        counts_C = np.bincount(release.labels()[selection.indices_S], minlength=len(listing.classes))
        print(f"{len(selection)} public clips selected: " + ", ".join(map("{} {}".format, counts_C, listing.classes)))

        labels_N = np.asarray(clips.labels_N)
        after = student_outputs(personal, release.teacher_head, clips, CPU)
        print(
            f"accuracy on the user's clips: base {100 * accuracy(outputs.probabilities_NC, labels_N):.0f} %, "
            f"personal {100 * accuracy(after.probabilities_NC, labels_N):.0f} %"
        )


if __name__ == "__main__":
    main()
