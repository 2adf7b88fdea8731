"""PURE: makes requests to serve: six classes of applications, conversations, or a recorded trace, at a given load.

Load 1 is what the machine serves if 32 rows share every step. Axes: N requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.request import Request

Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SHARED_ROWS: Final = 32
MOST_TOKENS: Final = 1_024
"""Longest prompt and longest answer. Clients ask for this much, since they do not know how long an answer will be."""
DEADLINE_S: Final = 2.0
DEADLINE_SHARE: Final = 3.0
"""A request's deadline is DEADLINE_S and this multiple of its time alone after its arrival."""
KINDS: Final = {
    "translate": 1.1,
    "correct": 1.0,
    "detoxify": 0.8,
    "summarise": 0.25,
    "comment": 0.5,
    "expand": 1.8,
}
"""Classes of applications, and how many tokens their answers have per prompt token (after Magnus, sec. 2)."""

HEAVY_USER: Final = "u0"


@dataclass(frozen=True)
class Workload:
    """Requests by arrival, with ids from 0 in that order. ``lengths[id]`` is how many tokens the answer will have."""

    requests: tuple[Request, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Prompt and answer lengths of N requests, (N,) each, and their classes."""

    prompts_N: Ints
    answers_N: Ints
    kinds: Sequence[str]


def lmaas_sizes(rng: np.random.Generator, count: int) -> Sizes:
    """Returns requests of six applications: an answer is its class's share of the prompt, with lognormal noise."""
    names = list(KINDS)
    drawn_N = rng.integers(0, len(names), count)
    prompts_N = _clipped(rng.lognormal(math.log(60), 0.8, count))
    ratios_N = np.array(list(KINDS.values()))[drawn_N]
    answers_N = _clipped(prompts_N * ratios_N * rng.lognormal(0, 0.15, count))
    return Sizes(prompts_N, answers_N, [names[each] for each in drawn_N])


def chat_sizes(rng: np.random.Generator, count: int) -> Sizes:
    """Returns conversations: prompt and answer are lognormal, with a median of 90 tokens each, independently."""
    prompts_N, answers_N = (_clipped(rng.lognormal(math.log(90), 0.9, count)) for _ in range(2))
    return Sizes(prompts_N, answers_N, ["chat"] * count)


def trace_sizes(rows_N3: Float64s, *, shrink: float = 8.0) -> Sizes:
    """Returns the lengths of a recorded trace, with prompts shortened by ``shrink``."""
    return Sizes(_clipped(rows_N3[:, 1] / shrink), _clipped(rows_N3[:, 2]), ["code"] * len(rows_N3))


def at_load(
    sizes: Sizes,
    gaps_N: Float64s,
    load: float,
    profile: GenerationProfile,
    *,
    users: Sequence[str] | None = None,
    system_tokens: int = 0,
) -> Workload:
    """Makes requests whose arrivals have these relative gaps, and whose work is ``load`` times the machine's time.

    Each prompt begins with ``system_tokens`` further tokens, which are the same for all requests of a class. The rest
    of a prompt is of no other request. Work and deadlines count as if nothing were shared.

    >>> rng = np.random.default_rng(0)
    >>> made = at_load(chat_sizes(rng, 50), rng.exponential(size=50), 0.5, reference_profile())
    >>> len(made.requests), made.requests[0].id, made.requests[3].arrival_s < made.requests[4].arrival_s
    (50, 0, True)
    """
    pairs = list(zip((sizes.prompts_N + system_tokens).tolist(), sizes.answers_N.tolist(), strict=True))
    work_s = sum(profile.work_s(prompt, answer, SHARED_ROWS) for prompt, answer in pairs)
    arrivals_N = np.cumsum(gaps_N)
    arrivals_N *= work_s / load / max(float(arrivals_N[-1]), 1e-9)
    requests = [
        Request(
            id=id,
            prompt=_prompt(id, prompt, sizes.kinds[id], system_tokens),
            max_tokens=max(MOST_TOKENS, answer),
            arrival_s=arrival_s,
            user=users[id] if users is not None else "",
            kind=sizes.kinds[id],
            deadline_s=arrival_s + DEADLINE_S + DEADLINE_SHARE * profile.alone_s(prompt, answer),
        )
        for id, (arrival_s, (prompt, answer)) in enumerate(zip(arrivals_N.tolist(), pairs, strict=True))
    ]
    return Workload(tuple(requests), tuple(answer for _, answer in pairs))


def _prompt(id: int, tokens: int, kind: str, system_tokens: int) -> Sequence[int]:
    if not system_tokens:
        return range(tokens)
    # Tokens are compared, never read: a class's own text, then one that no other request has.
    system = [-1 - at for at in range(system_tokens)]
    system[0] = -1_000_000 - sum((at + 1) * ord(letter) for at, letter in enumerate(kind))
    return [*system, *range(id << 20, (id << 20) + tokens - system_tokens)]


def poisson_gaps(rng: np.random.Generator, count: int) -> Float64s:
    """Returns relative gaps of a Poisson process."""
    return rng.exponential(size=count)


def bursty_gaps(rng: np.random.Generator, count: int, variation: float = 3.0) -> Float64s:
    """Returns relative gaps whose standard deviation is ``variation`` times their mean (gamma distributed)."""
    return rng.gamma(1 / variation**2, size=count)


def unequal_users(rng: np.random.Generator, count: int, *, users: int = 5, heavy: float = 0.8) -> list[str]:
    """Returns whose request each is: HEAVY_USER sends the share ``heavy``, the others the rest in equal shares."""
    light = (1 - heavy) / max(1, users - 1)
    shares = [heavy] + [light] * (users - 1) if users > 1 else [1.0]
    return [f"u{each}" for each in rng.choice(users, size=count, p=shares)]


def _clipped(lengths_N: npt.NDArray[np.floating] | Ints) -> Ints:
    clipped: Ints = np.clip(np.round(lengths_N), 1, MOST_TOKENS).astype(np.int64)
    return clipped
