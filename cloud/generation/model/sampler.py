"""Draws the next token from its logits. The draw depends on (seed, position) alone.

So a request that was preempted, computed again or moved continues as if nothing had happened: the generator has no
state to lose. V: tokens of the vocabulary.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.scheduling.request import Sampling

Float32s = npt.NDArray[np.float32]
_FIRST_LOOK: Final = 256
"""Number of most likely tokens that are sorted first; they nearly always hold ``top_p`` of the probability."""


def draw(logits_V: Float32s, sampling: Sampling, position: int) -> int:
    """Returns the token at ``position``. Temperature 0 takes the most likely one; the first of equals.

    With ``top_p`` below 1 only the most likely tokens that together reach it may be drawn (Holtzman et al. 2020).
    Raises ValueError for logits that are not finite.

    >>> draw(np.array([0.0, 3.0, 1.0], np.float32), Sampling(temperature=0.0), position=7)
    1
    """
    if not np.isfinite(logits_V).all():
        raise ValueError("the model's logits are not finite")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V.astype(np.float64) / sampling.temperature
    weights_V = np.exp(scaled_V - scaled_V.max())
    weights_V /= weights_V.sum()
    tokens_N = _nucleus(weights_V, sampling.top_p)
    cumulated_N = np.cumsum(weights_V[tokens_N])
    luck = uniform(sampling.seed, position) * cumulated_N[-1]
    return int(tokens_N[min(int(np.searchsorted(cumulated_N, luck, side="right")), len(tokens_N) - 1)])


def uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1) that only depends on its arguments (Salmon et al. 2011: Philox, counter-based)."""
    return float(np.random.Generator(np.random.Philox(key=seed % (1 << 64), counter=position)).random())


def _nucleus(weights_V: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[Any]:
    if top_p >= 1:
        return np.arange(len(weights_V))
    for most in (min(_FIRST_LOOK, len(weights_V)), len(weights_V)):
        likely_N = np.argpartition(-weights_V, most - 1)[:most]
        likely_N = likely_N[np.lexsort((likely_N, -weights_V[likely_N]))]
        reached_N = np.cumsum(weights_V[likely_N])
        if reached_N[-1] >= top_p or most == len(weights_V):
            break
    kept: npt.NDArray[Any] = likely_N[: int(np.searchsorted(reached_N, top_p)) + 1]
    return kept
