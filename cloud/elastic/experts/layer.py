"""The layer: a block's MLP as E experts, each width -> hidden -> width with GELU, of which a token uses k.

Where the experts are is not the layer's concern: in memory as modules (``InMemory``), or on a shelf that loads them
from files as they are needed (shelf.py).

Axes: B pictures, N rows (tokens of all pictures of a batch), T tasks, M layers with experts, D width, H hidden width of
an expert, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.experts.plan import chosen, logits, padded, planned
from isthmus.cloud.elastic.tasks.router import ExpertsShape


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer decided for a batch: all that balancing and measurements need."""

    layer: int
    clean_NE: Tensor
    noisy_NE: Tensor
    experts_NK: Tensor
    weights_NK: Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """The routers of a batch, and how many experts a token uses.

    ``tasks_B`` is the position of each picture's router among the T; None: all use the first. ``bias_TME`` is minus
    infinity for experts outside a task's window. ``least``: an expert with a smaller weight is skipped. In training,
    ``noise`` changes the logits. ``seen`` is called by each layer with what it decided.
    """

    weight_TMDE: Tensor
    bias_TME: Tensor
    k: int
    tasks_B: Tensor | None = None
    least: float = 0.0
    noise: Callable[[Tensor], Tensor] | None = None
    seen: Callable[[Seen], None] | None = None


class Expert(nn.Module):
    """One expert."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1: nn.Module = nn.Linear(width, hidden)
        self.fc2: nn.Module = nn.Linear(hidden, width)

    def forward(self, rows_ND: Tensor) -> Tensor:
        fused: Callable[[Tensor], Tensor] | None = getattr(self.fc1, "with_gelu", None)
        hidden_NH = functional.gelu(self.fc1(rows_ND)) if fused is None else fused(rows_ND)
        out_ND: Tensor = self.fc2(hidden_NH)
        return out_ND

    def remake(self, made: Callable[[nn.Linear], nn.Module]) -> None:
        """Replaces both linear layers by ``made(linear)``, for example of int8.py or packed.py."""
        for name in ("fc1", "fc2"):
            linear = getattr(self, name)
            if isinstance(linear, nn.Linear):
                setattr(self, name, made(linear))


class Experts(Protocol):
    """Where a layer finds its experts."""

    def each(self, layer: int, experts: Sequence[int]) -> Iterator[nn.Module]:
        """Yields these experts of a layer, in order. One is in use until the next one is asked for."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Holds experts on this device, in this number type, from now on."""

    def remake(self, made: Callable[[nn.Linear], nn.Module]) -> None:
        """Replaces the linear layers of all experts by ``made(linear)``."""


class InMemory(nn.ModuleList):
    """All experts of one layer, as modules: for training, and for serving with room for all."""

    def each(self, layer: int, experts: Sequence[int]) -> Iterator[nn.Module]:
        return (self[expert] for expert in experts)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.to(device, dtype)

    def remake(self, made: Callable[[nn.Linear], nn.Module]) -> None:
        for expert in self:
            if isinstance(expert, Expert):
                expert.remake(made)


class ExpertsMlp(nn.Module):
    """The experts of one block. ``layer`` counts the layers with experts from 0."""

    def __init__(self, layer: int, width: int, hidden: int, shape: ExpertsShape, source: Experts | None = None) -> None:
        """Without ``source`` all experts are made in memory, with torch's usual random weights."""
        super().__init__()
        self.layer, self.width, self.hidden, self.shape = layer, width, hidden, shape
        if source is None:
            source = InMemory(Expert(width, hidden) for _ in range(shape.experts))
        self.experts: Any = source

    def forward(self, normed_BND: Tensor, routing: Routing) -> Tensor:
        """Computes expert by expert. A token's result does not depend on the other tokens."""
        rows_ND, experts_NK, weights_NK = self._routed(normed_BND, routing)
        plan = planned(experts_NK, weights_NK, self.shape.experts, routing.least)
        out_ND = torch.zeros_like(rows_ND)
        pads = rows_ND.device.type == "cpu" and not torch.is_grad_enabled()
        for position, expert in enumerate(self.experts.each(self.layer, plan.experts)):
            rows_P, weights_P = plan.of(position)
            gathered_PD = _padded(rows_ND, rows_P) if pads else rows_ND.index_select(0, rows_P)
            made_PD = expert(gathered_PD)[: len(rows_P)]
            out_ND.index_add_(0, rows_P, made_PD * weights_P[:, None].to(made_PD.dtype))
        return out_ND.view(normed_BND.shape)

    def token_by_token(self, normed_BND: Tensor, routing: Routing) -> Tensor:
        """Computes each token with its experts before the next one: the usual order, to compare with."""
        rows_ND, experts_NK, weights_NK = self._routed(normed_BND, routing)
        out_ND = torch.zeros_like(rows_ND)
        for row, (experts_K, weights_K) in enumerate(zip(experts_NK.tolist(), weights_NK, strict=True)):
            for place, expert in enumerate(self.experts.each(self.layer, experts_K)):
                weight = weights_K[place]
                if weight > 0 and (place == 0 or weight >= routing.least):
                    out_ND[row] += weight.to(rows_ND.dtype) * expert(rows_ND[row : row + 1])[0]
        return out_ND.view(normed_BND.shape)

    def operations(self, k: int | None = None) -> int:
        """Returns the multiply-adds per token with ``k`` experts (None: the usual number), with the router's."""
        used = self.shape.k if k is None else k
        return 2 * used * self.width * self.hidden + self.width * self.shape.experts

    def _routed(self, normed_BND: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rows (N, D), and the experts of each with their weights, each (N, K)."""
        weight_TDE, bias_TE = routing.weight_TMDE[:, self.layer], routing.bias_TME[:, self.layer]
        # Probabilities in float32: in bfloat16, many of them would tie.
        clean_BNE = logits(normed_BND.float(), weight_TDE.float(), bias_TE.float(), routing.tasks_B)
        clean_NE = clean_BNE.flatten(0, 1)
        noisy_NE = clean_NE if routing.noise is None else routing.noise(clean_NE)
        experts_NK, weights_NK = chosen(noisy_NE, routing.k)
        if routing.seen is not None:
            routing.seen(Seen(self.layer, clean_NE, noisy_NE, experts_NK, weights_NK))
        return normed_BND.flatten(0, 1), experts_NK, weights_NK


def _padded(rows_ND: Tensor, rows_P: Tensor) -> Tensor:
    """Gathers rows, and fills them up with zeros to a number that products are fast for."""
    count = len(rows_P)
    gathered_QD = rows_ND.new_empty(padded(count), rows_ND.shape[1])
    torch.index_select(rows_ND, 0, rows_P, out=gathered_QD[:count])
    gathered_QD[count:] = 0
    return gathered_QD
