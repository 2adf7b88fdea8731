"""PURE: the policies by name, for command lines and settings. Every policy runs in the same engine."""

from collections.abc import Callable
from typing import Final

from isthmus.cloud.generation.policies.batches import Baton, Orca, Static
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.policies.jitserve import QUANTILE as JIT_QUANTILE
from isthmus.cloud.generation.policies.jitserve import JitServe
from isthmus.cloud.generation.policies.lengths import LearnedLengths, LengthPredictor
from isthmus.cloud.generation.policies.magnus import Magnus
from isthmus.cloud.generation.policies.orders import Fair, FirstCome, Order, Shortest
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
    "jitserve": JitServe,
}
"""What each policy decides:

- ``static``: a batch runs until its longest answer is complete.
- ``orca``: whole prompts before decodes, first come.
- ``baton``: one newcomer at a time joins padded rows.
- ``fused``: decodes and prompt chunks in one step, first come.
- ``sjf``, ``srpt``, ``hrrn``: ``fused``, in the order of predicted work; ``srpt`` may preempt.
- ``vtc``: ``fused``, the user who was served least first.
- ``paced``: ``fused``, which admits a request only if it is likelier in time than others become late because of it.
- ``jitserve``: ``fused``, by gain per second of remaining time, in windows of requests alike in length.
- ``magnus``: static batches of requests whose answers are predicted to be alike.

>>> sorted(POLICIES)
['baton', 'fused', 'hrrn', 'jitserve', 'magnus', 'orca', 'paced', 'sjf', 'srpt', 'static', 'vtc']
"""


ORDERS: Final[dict[str, Callable[[LengthPredictor], Order]]] = {
    "fused": lambda lengths: FirstCome(),
    "sjf": lambda lengths: Shortest("sjf", lengths),
    "hrrn": lambda lengths: Shortest("hrrn", lengths),
    "vtc": lambda lengths: Fair(),
}
"""The policies that are an order alone, and so can order requests in front of other servers."""


IDLE_QUANTILE: Final = 0.3
"""The quantile of lengths with which ``paced`` plans while nobody waits."""
MOST_OVER: Final = 1.5
"""The factor by which ``paced`` and ``jitserve`` plan with more than the median, at most."""


def learning_lengths(name: str) -> LearnedLengths:
    """Returns the predictor of lengths that suits the policy, without anything learned yet.

    ``paced`` follows the load within a bound, and ``magnus`` plans with medians: a batch's padding is wasted both ways.
    """
    if name == "paced":
        return LearnedLengths(idle_quantile=IDLE_QUANTILE, most_over=MOST_OVER)
    if name == "jitserve":
        return LearnedLengths(JIT_QUANTILE, conditional=True, most_over=MOST_OVER)
    return LearnedLengths(0.5) if name == "magnus" else LearnedLengths()


def make_policy(name: str, lengths: LengthPredictor | None = None) -> Policy:
    """Returns a new policy; ``lengths`` predicts the lengths of answers (default: ``learning_lengths``).

    Raises ValueError for an unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; known are {', '.join(POLICIES)}")
    return POLICIES[name](lengths or learning_lengths(name))


def make_order(name: str) -> Order:
    """Returns the order of a policy that is an order alone. Raises ValueError for others, which need our own engine."""
    if name not in ORDERS:
        raise ValueError(
            f"the policy {name!r} chooses the rows of each step, which other servers do themselves; in front of them "
            f"give one of {', '.join(ORDERS)}"
        )
    return ORDERS[name](LearnedLengths())
