"""Add a selection strategy, and see which public clips it picks for one user.

    python examples/add_strategy.py

A strategy gets what the device sent (prototypes: averaged class probabilities) and the public set as the teacher sees
it, and returns the public clips to distil on. The one below takes, per class, as many clips as the user's share of that
class, in random order. It is compared with the paper's ``cosine`` strategy on made-up numbers; nothing is trained.
"""

import numpy as np

from isthmus import STRATEGIES, Public, Selection, Wanted, add_strategy, make_prototypes


def class_shares(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Draw public clips so that their labels follow the user's class shares."""
    wanted_count = min(len(wanted.prototypes_KC) * samples_per_row, len(public))
    shares_C = wanted.shares_K @ wanted.prototypes_KC
    counts_C = np.floor(shares_C / shares_C.sum() * wanted_count).astype(int)
    picked = [
        rng.permutation(np.flatnonzero(public.labels_N == class_index))[:count]
        for class_index, count in enumerate(counts_C)
    ]
    return Selection.of(np.concatenate(picked))


def main() -> None:
    add_strategy("class_shares", class_shares)  # a recipe, a command or the cloud's worker may now name it

    rng = np.random.default_rng(0)
    classes = ("angry", "happy", "neutral", "sad")
    # A public set of 400 clips, as the teacher sees it: mostly right, seldom sure.
    labels_N = rng.integers(0, len(classes), 400)
    probabilities_NC = rng.dirichlet(np.ones(len(classes)), 400) + 1.5 * np.eye(len(classes))[labels_N]
    public = Public((probabilities_NC / probabilities_NC.sum(axis=1, keepdims=True)).astype(np.float32), labels_N)

    # A user who is mostly neutral or sad. Only the prototypes leave the device.
    outputs_NC = rng.dirichlet([0.2, 0.2, 3.0, 2.0], size=30).astype(np.float32)
    prototypes = make_prototypes(outputs_NC, seed=0)
    wanted = Wanted(prototypes.values_KC, prototypes.sizes_K)
    print(f"the device sends {len(prototypes.sizes_K)} prototypes of {prototypes.sizes_K.tolist()} clips")

    for name in ("class_shares", "cosine", "random"):
        selection = STRATEGIES[name](wanted, public, 8, np.random.default_rng(1))
        counts_C = np.bincount(labels_N[selection.indices_S], minlength=len(classes))
        print(f"{name:12} picks {len(selection):3} clips: " + ", ".join(map("{} {}".format, counts_C, classes)))


if __name__ == "__main__":
    main()
