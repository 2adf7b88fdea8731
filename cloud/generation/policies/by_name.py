"""PURE: the policies by name, for command lines and settings. Every policy runs in the same engine."""

from collections.abc import Callable
from typing import Final

from isthmus.cloud.generation.policies.batches import Baton, Orca, Static
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.policies.lengths import LearnedLengths, LengthPredictor
from isthmus.cloud.generation.policies.magnus import Magnus
from isthmus.cloud.generation.policies.orders import Fair, Shortest
from isthmus.cloud.generation.policies.paced import Paced
from isthmus.cloud.generation.scheduling.policy import Policy

DEFAULT_POLICY: Final = "fused"
POLICIES: Final[dict[str, Callable[[LengthPredictor], Policy]]] = {
    "static": lambda lengths: Static(),
    "orca": lambda lengths: Orca(),
    "baton": lambda lengths: Baton(),
    "fused": lambda lengths: Fused(),
    "sjf": lambda lengths: Fused(Shortest("sjf", lengths)),
    "srpt": lambda lengths: Fused(Shortest("srpt", lengths), preempts=True),
    "hrrn": lambda lengths: Fused(Shortest("hrrn", lengths)),
    "vtc": lambda lengths: Fused(Fair()),
    "paced": Paced,
    "magnus": Magnus,
}
"""What each policy decides:

- ``static``: a batch runs until its longest answer is complete.
- ``orca``: whole prompts before decodes, first come.
- ``baton``: one newcomer at a time joins padded rows.
- ``fused``: decodes and prompt chunks in one step, first come.
- ``sjf``, ``srpt``, ``hrrn``: ``fused``, in the order of predicted work; ``srpt`` may preempt.
- ``vtc``: ``fused``, the user who was served least first.
- ``paced``: ``fused``, which admits a request only if it and all others that can be in time stay so.
- ``magnus``: static batches of requests whose answers are predicted to be alike.

>>> sorted(POLICIES)
['baton', 'fused', 'hrrn', 'magnus', 'orca', 'paced', 'sjf', 'srpt', 'static', 'vtc']
"""


IDLE_QUANTILE: Final = 0.3
"""The quantile of lengths with which ``paced`` plans while nobody waits."""


def learning_lengths(name: str) -> LearnedLengths:
    """Returns the predictor of lengths that suits the policy, without anything learned yet.

    ``paced`` follows the load, and ``magnus`` plans with medians: a batch's padding is wasted both ways.
    """
    if name == "paced":
        return LearnedLengths(idle_quantile=IDLE_QUANTILE)
    return LearnedLengths(0.5) if name == "magnus" else LearnedLengths()


def make_policy(name: str, lengths: LengthPredictor | None = None) -> Policy:
    """Returns a new policy; ``lengths`` predicts the lengths of answers (default: ``learning_lengths``).

    Raises ValueError for an unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; known are {', '.join(POLICIES)}")
    return POLICIES[name](lengths or learning_lengths(name))
