"""Public clips held out from the branches' training: which they are, and a head and temperature fitted on them.

A head fitted on clips that its branches have memorised trusts the branch with the better memory, not the one that is
more accurate on new people. Axes: N clips, M modalities (sound, picture), D feature width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import functional

Float64s = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FOLDS: Final = 5
DECAY: Final = 1.0
"""How strongly a head's weights are pulled towards their start; docs/log.md has the values tried."""
MASKS: Final = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))


def held_out_clips(actors: Sequence[str], labels_N: npt.NDArray[np.int64], share: float, seed: int) -> Indices:
    """Return the sorted rows of the clips held out: at least ``share`` of them (0: none).

    If every clip has an actor and there are two or more, whole persons are held out: as few as reach the share, drawn
    with ``seed`` among the choices of that size. Otherwise ``share`` of each class is held out, rounded up, with at
    least one clip of the class left. Raises ValueError for a share outside [0, 1), and if nobody would be left to train
    on.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a held-out share of {share:g} is not in [0, 1)")
    count = len(labels_N)
    if share == 0:
        return np.zeros(0, np.int64)
    rng = np.random.default_rng((seed, count))
    if all(actors) and len(set(actors)) > 1:
        chosen = _fewest_actors(actors, share * count, rng)
        if len(chosen) == len(set(actors)):
            raise ValueError(f"holding out {share:g} of the clips leaves none of {len(chosen)} actors to train on")
        return np.flatnonzero([actor in chosen for actor in actors]).astype(np.int64)
    rows = []
    for label in np.unique(labels_N):
        of_class = rng.permutation(np.flatnonzero(labels_N == label))
        rows.append(of_class[: min(int(np.ceil(share * len(of_class))), len(of_class) - 1)])
    held = np.sort(np.concatenate(rows)).astype(np.int64)
    if held.size == 0:
        raise ValueError("no clip can be held out: every class has one clip alone")
    return held


def _fewest_actors(actors: Sequence[str], wanted: float, rng: np.random.Generator) -> set[str]:
    names, sizes = np.unique(np.asarray(actors), return_counts=True)
    largest = np.sort(sizes)[::-1]
    fewest = int(np.argmax(np.cumsum(largest) >= wanted)) + 1
    chosen: list[int] = []
    for actor in rng.permutation(len(names)):
        # Taken if the largest of the others can still reach the share in the places that are left.
        others = np.sort(np.delete(sizes, [*chosen, actor]))[::-1][: fewest - len(chosen) - 1]
        if len(chosen) < fewest and sizes[[*chosen, actor]].sum() + others.sum() >= wanted:
            chosen.append(int(actor))
    return {str(names[actor]) for actor in chosen}


@dataclass(frozen=True)
class Held:
    """Features of held-out clips and their labels. ``groups_N`` numbers the persons, or is all one."""

    features_NMD: Float64s
    labels_N: npt.NDArray[np.int64]
    groups_N: npt.NDArray[np.int64]

    def __getitem__(self, rows: npt.NDArray[np.bool_]) -> "Held":
        return Held(self.features_NMD[rows], self.labels_N[rows], self.groups_N[rows])


def fit_weights(held: Held, start_MCD: Float64s, bias_C: Float64s, dropout: float, decay: float = DECAY) -> Float64s:
    """Return weights (M, C, D) of a linear head for clips that neither branch has seen. The bias stays: it belongs to
    the classes.

    Minimises the mean cross-entropy expected under modality dropout (sound or picture absent with probability
    ``dropout`` each), plus ``decay`` times the squared distance of the weights from their start, each modality's in
    units of its features' mean square. The problem is convex: about a hundred clips decide the balance between the
    modalities, and the start decides the rest. Raises ValueError if there are no clips or shapes do not fit.
    """
    count, modalities, width = held.features_NMD.shape
    if count == 0 or start_MCD.shape != (modalities, len(bias_C), width):
        raise ValueError(f"features {held.features_NMD.shape} do not fit weights {start_MCD.shape}, or are none")
    features_NMD, labels_N = torch.from_numpy(held.features_NMD), torch.from_numpy(held.labels_N)
    start, bias = torch.from_numpy(start_MCD), torch.from_numpy(bias_C)
    weights = start.clone().requires_grad_()
    unit_M = features_NMD.square().mean(dim=(0, 2))
    cases = [
        (probability, torch.tensor(mask, dtype=torch.float64))
        for probability, mask in zip((1 - 2 * dropout, dropout, dropout), MASKS, strict=True)
        if probability
    ]
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        parts_NMC = torch.einsum("nmd,mcd->nmc", features_NMD, weights)
        total = decay * (unit_M * (weights - start).square().sum(dim=(1, 2))).sum()
        for probability, mask_M in cases:
            logits_NC = (parts_NMC * mask_M[:, None]).sum(dim=1) + bias
            total = total + probability * functional.cross_entropy(logits_NC, labels_N)
        total.backward()
        return total

    optimizer.step(objective)
    fitted: Float64s = weights.detach().numpy()
    return fitted


@dataclass(frozen=True)
class CrossFit:
    """Result of cross-fitting a head on held-out clips: each clip is classified by weights that have not seen it.

    ``accuracy_3``: accuracy with both modalities, with sound alone, with picture alone.
    """

    temperature: float
    accuracy_3: tuple[float, float, float]


def cross_fit(
    held: Held, start_MCD: Float64s, bias_C: Float64s, dropout: float, seed: int, decay: float = DECAY
) -> CrossFit:
    """Classify each fold with weights fitted on the other folds, and fit one temperature on all logits.

    Folds are persons if there are several, else each class is dealt out in equal parts. Raises ValueError for fewer
    than two clips.
    """
    if len(held.labels_N) < 2:
        raise ValueError("one held-out clip is too few to calibrate a head: raise the held-out share")
    fold_N = _folds(held, np.random.default_rng(seed))
    unseen_NMC = np.zeros((len(held.labels_N), len(MASKS[0]), len(bias_C)))
    for fold in np.unique(fold_N):
        weights_MCD = fit_weights(held[fold_N != fold], start_MCD, bias_C, dropout, decay)
        unseen_NMC[fold_N == fold] = np.einsum("nmd,mcd->nmc", held.features_NMD[fold_N == fold], weights_MCD)
    by_mask = [np.einsum("nmc,m->nc", unseen_NMC, np.asarray(mask)) + bias_C for mask in MASKS]
    both, sound, picture = (float((logits_NC.argmax(axis=1) == held.labels_N).mean()) for logits_NC in by_mask)
    return CrossFit(temperature(by_mask[0], held.labels_N), (both, sound, picture))


def temperature(logits_NC: Float64s, labels_N: npt.NDArray[np.int64]) -> float:
    """Return the divisor, from 1/20 to 20, at which the logits have the least cross-entropy (Guo et al., ICML 2017)."""

    def cross_entropy(log_temperature: float) -> float:
        of_class_NC = log_softmax(logits_NC / np.exp(log_temperature), axis=1)
        return -float(of_class_NC[np.arange(len(labels_N)), labels_N].mean())

    found = minimize_scalar(cross_entropy, bounds=(-np.log(20), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def _folds(held: Held, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return a fold number for each clip, from 0."""
    persons, person_N = np.unique(held.groups_N, return_inverse=True)
    if len(persons) > 1:
        dealt: npt.NDArray[np.int64] = rng.permutation(len(persons))[person_N] % FOLDS
        return dealt
    order_N = np.lexsort((rng.permutation(len(held.labels_N)), held.labels_N))
    fold_N = np.empty(len(order_N), np.int64)
    fold_N[order_N] = np.arange(len(order_N)) % FOLDS
    return fold_N
