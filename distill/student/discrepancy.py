"""PURE: how far apart two sets of rows are, as the proxy A-distance of the paper's section 5.4."""

from typing import Final

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.floating]

_FOLDS: Final = 5


def proxy_a_distance(
    ours_ND: Reals, theirs_MD: Reals, *, seed: int, ours_weights_N: npt.NDArray[np.floating] | None = None
) -> float:
    """Return 2 (1 - 2 err) of a linear classifier that separates the two sets (Ben-David et al. 2007), in [0, 2].

    ``err`` is the balanced error (the mean of both sides' error rates) of L2-regularised logistic regression on
    standardised columns, on rows it was not fitted on: stratified folds, as many as the smaller side has rows, at most
    5. Errors above a half count as a half. ``ours_weights_N`` is the number of clips behind each of our rows, as the
    sizes of prototypes are. Without it all rows count alike.

    Raises ValueError if a side has fewer than two rows, since then nothing can be held out, or if the widths differ.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    smaller = min(len(ours_ND), len(theirs_MD))
    if smaller < 2:
        raise ValueError(f"{len(ours_ND)} and {len(theirs_MD)} rows cannot be compared: both sides need two")
    rows_RD = np.concatenate([ours_ND, theirs_MD]).astype(np.float64)
    side_R = np.repeat([0, 1], [len(ours_ND), len(theirs_MD)])
    ours_N = np.ones(len(ours_ND)) if ours_weights_N is None else np.asarray(ours_weights_N, np.float64)
    weight_R = np.concatenate([ours_N / ours_N.sum(), np.full(len(theirs_MD), 1 / len(theirs_MD))])
    wrong_S = np.zeros(2)
    total_S = np.zeros(2)
    folds = StratifiedKFold(min(_FOLDS, smaller), shuffle=True, random_state=seed % (1 << 32))
    for fitted, held_out in folds.split(rows_RD, side_R):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
        fit_weight = weight_R[fitted].copy()
        for side in (0, 1):  # both sides have the same weight in every fold
            own = side_R[fitted] == side
            fit_weight[own] *= len(fitted) / (2 * fit_weight[own].sum())
        model.fit(rows_RD[fitted], side_R[fitted], logisticregression__sample_weight=fit_weight)
        missed = model.predict(rows_RD[held_out]) != side_R[held_out]
        for side in (0, 1):
            own = side_R[held_out] == side
            wrong_S[side] += weight_R[held_out][own & missed].sum()
            total_S[side] += weight_R[held_out][own].sum()
    error = float((wrong_S / total_S).mean())
    return 2 * (1 - 2 * min(error, 0.5))
