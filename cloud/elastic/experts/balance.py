"""PURE: the part of the loss that keeps experts evenly used, and the noise that goes with it, in training alone.

M3ViT takes both from Shazeer et al., "Outrageously Large Neural Networks" (ICLR 2017), and Riquelme et al., "Scaling
Vision with Sparse Mixture of Experts" (NeurIPS 2021): logits get Gaussian noise, and the loss grows with the squared
coefficients of variation of importance (sum of the weights of an expert) and load (number of its tokens).

Axes: N rows, E experts, K experts per token.
"""

from typing import Final

import torch
from torch import Tensor

WEIGHT: Final = 0.01
SMALLEST: Final = 1e-10


def squared_variation(values_E: Tensor) -> Tensor:
    """Returns the squared coefficient of variation (scalar): variance over squared mean; 0 for a single value."""
    if values_E.numel() == 1:
        return values_E.new_zeros(())
    return values_E.var(unbiased=True) / (values_E.mean().square() + SMALLEST)


def importance(experts_NK: Tensor, weights_NK: Tensor, experts: int) -> Tensor:
    """Returns the sum of each expert's weights over all rows (E,)."""
    return weights_NK.new_zeros(experts).index_add(0, experts_NK.flatten(), weights_NK.flatten())


def load(clean_NE: Tensor, noisy_NE: Tensor, k: int, deviation: float) -> Tensor:
    """Returns how many rows use each expert, smoothed so that it has a gradient (E,).

    It sums over rows the probability that the expert would be among the ``k`` largest if its own noise were drawn
    again, while the noise of the others stays. ``deviation`` is that of the noise. At 0 it is the plain count of
    rows, without a gradient; so it is if every expert is used.
    """
    experts = clean_NE.shape[1]
    if deviation == 0 or k >= experts:
        used_NK = noisy_NE.detach().topk(k, dim=-1).indices
        return torch.bincount(used_NK.flatten(), minlength=experts).to(clean_NE.dtype)
    largest_NM = noisy_NE.topk(k + 1, dim=-1).values
    inside_N1, outside_N1 = largest_NM[:, k - 1 : k], largest_NM[:, k:]
    # Without itself, an expert that is among the k largest must beat the next one; any other must beat the last of
    # the k.
    threshold_NE = torch.where(noisy_NE >= inside_N1, outside_N1, inside_N1)
    usable_NE = clean_NE.isfinite() & threshold_NE.isfinite()
    above_NE = torch.where(usable_NE, clean_NE - threshold_NE, torch.zeros_like(clean_NE)) / deviation
    certain_NE = (clean_NE.isfinite() & ~threshold_NE.isfinite()).to(clean_NE.dtype)
    return torch.where(usable_NE, torch.special.ndtr(above_NE), certain_NE).sum(dim=0)


def loss(importance_E: Tensor, load_E: Tensor, weight: float = WEIGHT) -> Tensor:
    """Returns the loss of one layer (scalar)."""
    return weight * (squared_variation(importance_E) + squared_variation(load_E))
