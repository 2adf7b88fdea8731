"""Controls for comparing strategies: chance, everything, and an oracle that knows the client's classes."""

import numpy as np

from isthmus.distill.selection.interface import (
    Indices,
    Public,
    Selection,
    Strategy,
    Wanted,
    check,
    wanted_count,
)
from isthmus.distill.selection.quota import members_by_class, quotas


def random(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Take as many public samples as ``cosine`` would, drawn at random whatever the device sent."""
    check(wanted, public, samples_per_row)
    count = wanted_count(wanted, public, samples_per_row)
    return Selection.of(np.sort(rng.choice(len(public), size=count, replace=False)).astype(np.int64))


def everything(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
    """Take the whole public set."""
    check(wanted, public, samples_per_row)
    return Selection.whole(len(public))


def class_oracle(true_counts_C: Indices) -> Strategy:
    """Return a strategy for experiments: as many random public samples of each class as the client truly has, in
    proportion.

    No service can know ``true_counts_C``, so no table of strategies contains it. Classes with too few public samples
    are replaced as in ``quota``. The strategy raises ValueError unless there is one count per class.
    """

    def oracle(wanted: Wanted, public: Public, samples_per_row: int, rng: np.random.Generator) -> Selection:
        check(wanted, public, samples_per_row)
        classes = wanted.prototypes_KC.shape[1]
        if true_counts_C.shape != (classes,) or (true_counts_C < 0).any() or true_counts_C.sum() == 0:
            raise ValueError(f"{true_counts_C.tolist()} are not the client's counts of {classes} classes")
        members = members_by_class(public, classes)
        capacity_C = np.array([len(members_M) for members_M in members])
        total = min(wanted_count(wanted, public, samples_per_row), int(capacity_C.sum()))
        counts_C = quotas(true_counts_C / true_counts_C.sum(), capacity_C, total)
        picked = [
            rng.choice(members_M, size=count, replace=False) for members_M, count in zip(members, counts_C, strict=True)
        ]
        return Selection.of(np.sort(np.concatenate(picked)).astype(np.int64))

    return oracle
