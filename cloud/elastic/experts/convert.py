"""Makes experts of a dense MLP: each begins as a slice of its hidden units.

With k = E and a router that treats all experts alike, the layer then computes what the dense MLP computes: each weight
is 1 / E, so each slice is scaled by hidden units of the MLP / hidden units of an expert. M3ViT says nothing of this.
"""

from typing import Any, Final

import torch
from torch import nn

from isthmus.cloud.elastic.experts.layer import ExpertsMlp
from isthmus.cloud.elastic.scheduling.levels import MAX_EXPERTS
from isthmus.cloud.elastic.tasks.router import ExpertsShape

EXPERTS: Final = 16
USED: Final = 4
"""M3ViT's usual numbers: 16 experts per layer, of which a token uses 4."""


def converted(mlp: Any, layer: int, shape: ExpertsShape, hidden: int) -> ExpertsMlp:
    """Returns ``mlp`` (timm's plain MLP with exact GELU) as experts of ``hidden`` units each. It copies the weights.

    Expert e begins with slice e of the hidden units; after the last slice, they begin with the first one again. Raises
    ValueError for another kind of MLP, and for numbers with which the experts together are not the MLP.
    """
    check(mlp, shape, hidden)
    units = mlp.fc1.out_features
    made = ExpertsMlp(layer, mlp.fc1.in_features, hidden, shape)
    with torch.no_grad():
        for number, expert in enumerate(made.experts):
            first = number * hidden % units
            expert.fc1.weight.copy_(mlp.fc1.weight[first : first + hidden])
            expert.fc2.weight.copy_(mlp.fc2.weight[:, first : first + hidden] * (units / hidden))
            for linear, bias in ((expert.fc1, mlp.fc1.bias), (expert.fc2, mlp.fc2.bias)):
                nn.init.zeros_(linear.bias)
                if bias is not None:
                    linear.bias.copy_(bias[first : first + hidden] if linear is expert.fc1 else bias)
    return made


def check(mlp: Any, shape: ExpertsShape, hidden: int) -> None:
    """Raises ValueError if ``mlp`` cannot become these experts."""
    reason = _other(mlp)
    if reason is not None:
        raise ValueError(f"only a plain MLP with exact GELU becomes experts; this is {reason}")
    units = mlp.fc1.out_features
    if not 1 <= shape.experts <= MAX_EXPERTS or not 1 <= shape.k <= shape.experts:
        raise ValueError(
            f"{shape.k} of {shape.experts} experts per token: from 1 to {MAX_EXPERTS} experts are possible, and a "
            "token uses at most all of them"
        )
    if hidden < 1 or units % hidden or shape.experts * hidden % units:
        raise ValueError(
            f"{shape.experts} experts of {hidden} units are not an MLP of {units} units: an expert's units must divide "
            f"{units}, and {units} all experts' units"
        )


def _other(mlp: Any) -> str | None:
    if not isinstance(getattr(mlp, "fc1", None), nn.Linear) or not isinstance(getattr(mlp, "fc2", None), nn.Linear):
        return f"a {type(mlp).__name__}"
    if type(getattr(mlp, "act", None)) is not nn.GELU or mlp.act.approximate != "none":
        return f"one with {type(getattr(mlp, 'act', None)).__name__} in another form"
    if mlp.fc1.out_features != mlp.fc2.in_features or not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        return "one with a gate or a norm inside"
    return None


def group(number: int, shape: ExpertsShape, hidden: int, units: int) -> tuple[int, int]:
    """Returns (first, count) of a group of neighbouring experts that together are the whole dense MLP of ``units``.

    Groups repeat if ``number`` passes the last one.
    """
    count = units // hidden
    return number % max(1, shape.experts // count) * count, count
