"""PURE: decides which experts each token uses, and in which order the experts are computed.

M3ViT (Liang et al., NeurIPS 2022). A router gives each token a probability per expert, p = softmax(x W + b). The k
largest are used, weighted by p as they are: they are not divided by their sum. So with k = E the layer is a plain
mixture. Where we differ: a router has a bias per expert (M3ViT has none). A shared router, which reads the token beside
an embedding of the task, is then a router of the task like any other: its part for the embedding is that bias.

Computing goes expert by expert, not token by token: the pairs (token, expert) are sorted by expert, so each expert's
weights are read once per batch.

Axes: B pictures, N rows (tokens of all pictures of a batch), T tasks, D width, E experts, K experts per token, P pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """The pairs (row, expert), sorted by expert and then by row.

    ``experts`` are those with work, ascending; pairs ``starts[i]`` to ``starts[i + 1]`` - 1 belong to ``experts[i]``.
    """

    experts: tuple[int, ...]
    starts: tuple[int, ...]
    rows_P: Tensor
    weights_P: Tensor

    def of(self, position: int) -> tuple[Tensor, Tensor]:
        """Returns the rows and weights of ``experts[position]``."""
        pairs = slice(self.starts[position], self.starts[position + 1])
        return self.rows_P[pairs], self.weights_P[pairs]


def logits(tokens_BND: Tensor, weight_TDE: Tensor, bias_TE: Tensor, tasks_B: Tensor | None) -> Tensor:
    """Returns what the routers say of each token (B, N, E).

    ``tasks_B`` is the position of each picture's router among the T; None: all pictures use the first one. ``bias_TE``
    is minus infinity for experts that a task may not use.
    """
    if tasks_B is None:
        found: Tensor = tokens_BND @ weight_TDE[0] + bias_TE[0]
        return found
    return torch.baddbmm(bias_TE[tasks_B][:, None], tokens_BND, weight_TDE[tasks_B])


def chosen(logits_NE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k most probable experts of each row, most probable first, and their probabilities: each (N, K).

    Of equally probable experts, the one with the lower number comes first. Raises ValueError for a k outside [1, E].
    """
    if not 1 <= k <= logits_NE.shape[-1]:
        raise ValueError(f"{k} of {logits_NE.shape[-1]} experts cannot be used")
    shares_NE = logits_NE.softmax(dim=-1)
    left_NE = shares_NE.detach().clone()
    experts = []
    for _ in range(k):  # argmax returns the first of equal values; topk does not say which
        best_N1 = left_NE.argmax(dim=-1, keepdim=True)
        left_NE.scatter_(-1, best_N1, -1.0)
        experts.append(best_N1)
    experts_NK = torch.cat(experts, dim=-1)
    return experts_NK, shares_NE.gather(-1, experts_NK)


def planned(experts_NK: Tensor, weights_NK: Tensor, experts: int, least: float = 0.0) -> Plan:
    """Sorts the pairs by expert. Pairs whose weight is 0, or under ``least``, are left out.

    A weight of 0 adds nothing, and that of an expert outside a task's window is 0. ``least`` follows M3ViT's option
    ``expert_prune``. Where we differ: the most probable expert of a token always stays.
    """
    places = experts_NK.shape[1]
    wanted_P = (weights_NK > 0) & (weights_NK >= least)
    wanted_P[:, 0] = True
    keys_P = torch.where(wanted_P, experts_NK, experts).flatten()
    counts = torch.bincount(keys_P, minlength=experts + 1).tolist()
    order_P = _sorted(keys_P)[: len(keys_P) - counts[experts]]
    used = tuple(expert for expert in range(experts) if counts[expert])
    starts = [0]
    for expert in used:
        starts.append(starts[-1] + counts[expert])
    return Plan(used, tuple(starts), order_P.div(places, rounding_mode="floor"), weights_NK.flatten()[order_P])


def _sorted(keys_P: Tensor) -> Tensor:
    """Returns the stable order of keys below 256. On processors by numpy's radix sort, 20 times as fast."""
    if keys_P.device.type != "cpu":
        return keys_P.argsort(stable=True)
    return torch.from_numpy(np.argsort(keys_P.to(torch.uint8).numpy(), kind="stable"))


def padded(rows: int) -> int:
    """Returns the number of rows, rounded up, that an expert's products are computed with.

    Every batch gives an expert another number of rows. oneDNN generates code for each number, which takes longer than
    the product itself (0.3 to 0.7 ms against 0.1 to 0.4 ms at 20 to 200 rows of width 192).
    """
    step = next((step for most, step in ((256, 16), (1_024, 32)) if rows <= most), 64)
    return -(-rows // step) * step
