"""A workload by its name, and a policy that serves it in simulation. It needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.policies.lengths import LengthPredictor
from isthmus.cloud.generation.scheduling.blocks import BLOCK_TOKENS
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Life, Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.report import by_user
from isthmus.cloud.generation.scheduling.simulate import Run, VirtualWorld, serve
from isthmus.cloud.generation.scheduling.workload import (
    HEAVY_USER,
    Sizes,
    Workload,
    chat_sizes,
    lmaas_sizes,
    trace_sizes,
)
from isthmus.command_line import did_you_mean
from isthmus.data.traces import read_azure_tokens

_MADE: Final = {"lmaas": lmaas_sizes, "chat": chat_sizes}
WARM_REQUESTS: Final = 500
"""Requests of an earlier day, from which warm predictors of lengths have learned."""
EARLIER: Final = 1_000_003
"""What the seed of that day is beyond the seed of this one."""


def sizes_of(
    workload: str, requests: int, seed: int | np.random.Generator, shrink: float
) -> tuple[Sizes, npt.NDArray[np.float64] | None]:
    """Returns lengths of requests, and the gaps between their arrivals if a trace was recorded with them.

    ``shrink`` divides the prompts of a trace. Raises ValueError for a workload that is neither made nor a file.
    """
    if workload in _MADE:
        return _MADE[workload](np.random.default_rng(seed), requests), None
    if Path(workload).is_file():
        rows_N3 = read_azure_tokens(Path(workload))[:requests]
        return trace_sizes(rows_N3, shrink=shrink), np.diff(rows_N3[:, 0], prepend=0.0)
    known = did_you_mean(workload, _MADE)
    raise ValueError(f"no workload {workload!r}: give lmaas, chat or the CSV file of a trace.{known}")


def check_room(tokens: int, kv_tokens: int) -> None:
    """Raises ValueError if the longest request, of so many tokens, is more than the KV cache holds."""
    if tokens > kv_tokens // BLOCK_TOKENS * BLOCK_TOKENS:
        least = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        raise ValueError(f"--kv-tokens {kv_tokens}: the longest request may take {tokens}; give at least {least}")


def learn(predictor: LengthPredictor, before: Workload) -> None:
    """Lets a predictor learn from the answers of an earlier day."""
    for request, length in zip(before.requests, before.lengths, strict=True):
        predictor.learn(Life(request, [0] * length, whole=True))


def served(
    made: Workload,
    profile: GenerationProfile,
    policy: str,
    lengths: LengthPredictor | None,
    limits: Limits,
    *,
    expires: bool = False,
) -> Run:
    """Serves a workload in simulation. ``expires``: requests that can no longer be in time are evicted.

    Raises ValueError for an unknown policy.
    """
    engine = Engine(
        profile,
        make_policy(policy, lengths),
        limits,
        max_requests=len(made.requests),
        expires=expires,
        adapts=False,
    )
    return serve(engine, made.requests, VirtualWorld(profile, made.lengths))


def light_ttft_s(run: Run) -> Sequence[float]:
    """Returns the mean time to the first token of each user but the heavy one."""
    return [each["ttft_s"] for user, each in by_user(run).items() if user != HEAVY_USER]
