"""PURE: the policies by name, for command lines and settings. Every policy runs in the same engine."""

from collections.abc import Callable
from typing import Final

from isthmus.cloud.generation.policies.batches import Baton, Orca, Static
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.policies.lengths import LearnedLengths, LengthPredictor
from isthmus.cloud.generation.policies.orders import Fair, Shortest
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
}
"""What each policy decides:

- ``static``: a batch runs until its longest answer is complete.
- ``orca``: whole prompts before decodes, first come.
- ``baton``: one newcomer at a time joins padded rows.
- ``fused``: decodes and prompt chunks in one step, first come.
- ``sjf``, ``srpt``, ``hrrn``: ``fused``, in the order of predicted work; ``srpt`` may preempt.
- ``vtc``: ``fused``, the user who was served least first.

>>> sorted(POLICIES)
['baton', 'fused', 'hrrn', 'orca', 'sjf', 'srpt', 'static', 'vtc']
"""


def make_policy(name: str, lengths: LengthPredictor | None = None) -> Policy:
    """Returns a new policy; ``lengths`` predicts the lengths of answers (default: learned from those that end).

    Raises ValueError for an unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; known are {', '.join(POLICIES)}")
    return POLICIES[name](lengths or LearnedLengths())
