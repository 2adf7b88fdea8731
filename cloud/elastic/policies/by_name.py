"""PURE: the policies by name, for command lines and settings. Every policy runs in the same engine."""

from collections.abc import Callable
from typing import Final

from isthmus.cloud.elastic.policies.baselines import Clipper, DynamicBatching, Fifo, FixedGamma
from isthmus.cloud.elastic.policies.infaas import NAME as INFAAS
from isthmus.cloud.elastic.policies.otas import Otas, Planner
from isthmus.cloud.elastic.policies.priced import Priced
from isthmus.cloud.elastic.policies.throughput import ThroughputRule
from isthmus.cloud.elastic.scheduling.policy import Choice, Policy
from isthmus.cloud.elastic.scheduling.profile import Profile

__all__ = ["DEFAULT_POLICY", "POLICIES", "Choice", "Fifo", "Policy", "add_policy", "make_policy"]

DEFAULT_POLICY: Final = "priced"
POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    "priced": Priced,
    "exact": lambda: Otas(Planner.EXACT),
    "otas": lambda: Otas(Planner.PAPER),
    "pets": Fifo,
    "clipper": Clipper,
    "throughput": ThroughputRule,
}
"""What each policy decides:

- ``priced``: the batch and its gamma together, by a price of the executor's time.
- ``exact`` and ``otas``: batches by Alg. 1, then each batch's gamma by the exact planner or by the paper's.
- ``pets`` and ``clipper``: the batch only; gamma is always 0.
- ``throughput``: batches by Alg. 1; the gamma removes as few tokens as the arrival rate allows (Prodigy's scheduler).
- ``fixed:G``: batches by Alg. 1; gamma is always G (ToMe, VPT).
- ``dynamic:SIZES:MS``: Triton's dynamic batcher with preferred sizes (``16+32``) and a largest delay; gamma is 0.

>>> sorted(POLICIES)
['clipper', 'exact', 'otas', 'pets', 'priced', 'throughput']
"""


def add_policy(name: str, make: Callable[[], Policy]) -> None:
    """Make the policy that ``make`` returns known under ``name`` to settings and commands of this process.

    ``make`` is called once per engine. Raises ValueError if ``name`` is not an identifier, or already belongs to
    another policy. An installed package adds its policies through an extension (``isthmus.extensions``).

    >>> add_policy("mine", POLICIES["pets"])
    >>> make_policy("mine", paper_profile()).gammas
    (0,)
    >>> del POLICIES["mine"]
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot name a policy: use letters, digits and underscores")
    if POLICIES.setdefault(name, make) is not make:
        raise ValueError(f"there is already a policy named {name!r}: choose another name")


def make_policy(name: str, profile: Profile) -> Policy:
    """Returns a new policy that plans with ``profile``.

    Raises ValueError for an unknown name (the message lists the known ones) and for a gamma that was not measured.

    >>> make_policy("fixed:-5", paper_profile()).gammas
    (-5,)
    """
    policy: Policy
    if name.startswith("fixed:"):
        try:
            gamma = int(name.removeprefix("fixed:"))
        except ValueError as error:
            raise ValueError(f"fixed:G needs a whole number, not {name!r}") from error
        policy = FixedGamma(gamma)
    elif name.startswith("dynamic:"):
        policy = DynamicBatching.named(name.removeprefix("dynamic:"))
    elif name in POLICIES:
        policy = POLICIES[name]()
    elif name.partition(":")[0] == INFAAS:
        raise ValueError(
            "infaas chooses among models of several sizes per task, and here is one model: 'isthmus elastic variants' "
            "makes a folder of them for 'isthmus cloud serve --elastic-variants'"
        )
    else:
        raise ValueError(f"no policy {name!r}; known are {', '.join(POLICIES)}, fixed:G and dynamic:SIZES:MS")
    policy.use(profile)
    return policy
