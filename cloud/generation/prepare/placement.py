"""PURE: how a number of replicas serve best: all alike, or some for prompts and some for decodes (Zhong et al. 2024,
"DistServe", Alg. 1).

For each placement the highest rate is searched, by bisection, at which a share of the requests gets its first token and
its further tokens in time. The simulator is the one that policies are compared with.

Where we differ: all replicas are alike, so there is no search over parallelism inside one; and replicas are fused with
chunked prompts, which the paper's baseline is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from isthmus.cloud.generation.policies.batches import Orca
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.fleet import Fleet, FleetRules
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.request import Request
from isthmus.cloud.generation.scheduling.workload import Sizes

SHARE: Final = 0.9
"""Share of the requests that must be in time."""
RATES: Final = 7
"""Halvings of the range of rates: the result is within 1 % of the range."""
BEYOND: Final = 1.5
"""The range ends at this multiple of the rate of full steps: a list of requests that ends can be served at more."""
CHUNKS: Final = (64, 128, 512)


@dataclass(frozen=True, slots=True)
class Placement:
    """``prefill`` replicas compute prompts and ``decode`` the rest; with 0 of them, ``decode`` replicas do both.

    ``chunk_tokens``: tokens of a fused step up to which prompts are added.
    """

    prefill: int
    decode: int
    chunk_tokens: int = 128

    def __str__(self) -> str:
        if not self.prefill:
            return f"{self.decode} fused, chunks of {self.chunk_tokens}"
        return f"{self.prefill} for prompts + {self.decode} for decodes"


def placements(replicas: int, chunks: Sequence[int] = CHUNKS) -> list[Placement]:
    """Returns every placement of so many replicas.

    >>> [str(each) for each in placements(2, chunks=[128])]
    ['2 fused, chunks of 128', '1 for prompts + 1 for decodes']
    """
    fused = [Placement(0, replicas, chunk) for chunk in chunks]
    return fused + [Placement(prefill, replicas - prefill) for prefill in range(1, replicas)]


@dataclass(frozen=True, slots=True)
class Goals:
    """Within what a request's first token, and each further one on average, must be there; for which share of them."""

    ttft_s: float
    tpot_s: float
    share: float = SHARE


def best_rate(
    placement: Placement,
    sizes: Sizes,
    goals: Goals,
    profile: GenerationProfile,
    limits: Limits,
    *,
    seed: int = 0,
) -> float:
    """Returns the highest rate, in requests per second, at which the placement keeps the goals; 0 if at none."""
    work_s = sum(
        profile.work_s(prompt, answer, limits.rows)
        for prompt, answer in zip(sizes.prompts_N.tolist(), sizes.answers_N.tolist(), strict=True)
    )
    low, high = 0.0, BEYOND * (placement.prefill + placement.decode) * len(sizes.prompts_N) / work_s
    for _ in range(RATES):
        middle = (low + high) / 2
        kept = share_in_time(placement, sizes, middle, goals, profile, limits, seed=seed)
        low, high = (middle, high) if kept >= goals.share else (low, middle)
    return low


def share_in_time(
    placement: Placement,
    sizes: Sizes,
    rate: float,
    goals: Goals,
    profile: GenerationProfile,
    limits: Limits,
    *,
    seed: int = 0,
) -> float:
    """Returns the share of the requests that keep the goals if they arrive at ``rate`` per second, as Poisson does."""
    arrivals_N = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(sizes.prompts_N)))
    requests = [
        Request(
            id,
            range(prompt),
            max_tokens=answer,
            arrival_s=arrival_s,
            ttft_s=goals.ttft_s,
            tpot_s=goals.tpot_s,
        )
        for id, (arrival_s, prompt, answer) in enumerate(
            zip(arrivals_N.tolist(), sizes.prompts_N.tolist(), sizes.answers_N.tolist(), strict=True)
        )
    ]
    engines = [
        Engine(
            profile,
            Orca() if at < placement.prefill else Fused(chunk_tokens=placement.chunk_tokens),
            limits,
            max_requests=len(requests),
            expires=False,
            adapts=False,
        )
        for at in range(placement.prefill + placement.decode)
    ]
    rules = FleetRules(prefill=placement.prefill)
    ends = Fleet(engines, profile, requests, sizes.answers_N.tolist(), rules).serve().run.ends
    return sum(end.in_time for end in ends) / len(requests)
