"""One simulation is a cell: what is simulated, as plain data, and its figures as JSON values."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from isthmus.cloud.generation.policies.by_name import learning_lengths
from isthmus.cloud.generation.policies.fused import Fused
from isthmus.cloud.generation.policies.lengths import KnownLengths, LearnedLengths, LengthPredictor, NearestLengths
from isthmus.cloud.generation.prepare.placement import Goals, best_rate, placements
from isthmus.cloud.generation.prepare.replaying import EARLIER, WARM_REQUESTS, learn, light_ttft_s, served, sizes_of
from isthmus.cloud.generation.scheduling.bound import goodput_bound, mean_latency_bound_s
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.fleet import Fleet, FleetRules
from isthmus.cloud.generation.scheduling.policy import Life, Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, reference_profile
from isthmus.cloud.generation.scheduling.report import by_user, jain, report
from isthmus.cloud.generation.scheduling.workload import (
    HEAVY_USER,
    Workload,
    at_load,
    bursty_gaps,
    poisson_gaps,
    unequal_users,
)

LIMITS: Final = Limits(rows=32, blocks=1_000)
PREDICTORS: Final = ("least squares", "least squares, conditional", "nearest")
SHRINK: Final = 8.0

Kind = Literal["policy", "bound", "fairness", "prediction", "fleet", "placement", "prefix", "swap"]


@dataclass(frozen=True)
class Cell:
    """What is simulated. ``workload``: lmaas, chat, or the path of an Azure trace, whose order has no seed.

    ``name`` is a policy, a predictor, a fleet's rules or a placement's goals, according to ``kind``.
    """

    kind: Kind
    workload: str
    load: float
    seed: int
    name: str
    requests: int
    lengths: Literal["learned", "warm", "known"] = "warm"

    @property
    def key(self) -> str:
        """A name that files may have."""
        of = (self.kind, Path(self.workload).stem, f"{self.load:g}", self.name, self.lengths, self.requests, self.seed)
        return "_".join(str(part).replace(" ", "-").replace(",", "") for part in of)


def run(cell: Cell) -> dict[str, Any]:
    """Simulates a cell and returns its figures. Raises ValueError for an unknown name or workload."""
    work = {
        "policy": _policy,
        "bound": _bound,
        "fairness": _fairness,
        "prediction": _prediction,
        "fleet": _fleet,
        "placement": _placement,
        "prefix": _prefix,
        "swap": _swap,
    }
    return {**asdict(cell), **work[cell.kind](cell, reference_profile())}


def _workload(cell: Cell, profile: GenerationProfile, *, users: bool = False, seed: int | None = None) -> Workload:
    rng = np.random.default_rng(cell.seed if seed is None else seed)
    requests = cell.requests if seed is None else WARM_REQUESTS
    sizes, gaps_N = sizes_of(cell.workload, requests, rng, SHRINK)
    if gaps_N is None:
        gaps_N = poisson_gaps(rng, len(sizes.prompts_N))
    names = unequal_users(rng, len(gaps_N)) if users else None
    return at_load(sizes, gaps_N, cell.load, profile, users=names)


def _lengths(cell: Cell, profile: GenerationProfile, made: Workload, predictor: LengthPredictor) -> LengthPredictor:
    if cell.lengths == "known":
        return KnownLengths(made.lengths.__getitem__)
    if cell.lengths == "warm" and not Path(cell.workload).is_file():
        learn(predictor, _workload(cell, profile, seed=cell.seed + EARLIER))
    return predictor


def _policy(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    made = _workload(cell, profile)
    lengths = _lengths(cell, profile, made, learning_lengths(cell.name))
    return report(served(made, profile, cell.name, lengths, LIMITS))


SWAPS: Final = {"computed again": 0, "swapped": LIMITS.blocks}
"""Blocks of the pool beside the KV cache, where preempted requests may wait with what they have computed."""
SWAP_POLICY: Final = "jitserve"
"""The policy that preempts most."""


def _swap(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    made = _workload(cell, profile)
    lengths = _lengths(cell, profile, made, learning_lengths(SWAP_POLICY))
    return report(served(made, profile, SWAP_POLICY, lengths, replace(LIMITS, swap_blocks=SWAPS[cell.name])))


def _bound(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    made = _workload(cell, profile)
    return {
        "mean_s": mean_latency_bound_s(made, profile, LIMITS.rows),
        "goodput": goodput_bound(made, profile, LIMITS.rows),
    }


def _fairness(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    made = _workload(cell, profile, users=True)
    ran = served(made, profile, cell.name, learning_lengths(cell.name), LIMITS)
    users = by_user(ran)
    return {
        "light_ttft_s": float(np.mean(light_ttft_s(ran))),
        "heavy_ttft_s": users[HEAVY_USER]["ttft_s"],
        "tokens_per_s": report(ran)["tokens_per_s"],
        "jain": jain([each["tokens"] for each in users.values()]),
    }


def predictor_of(name: str) -> LengthPredictor:
    """Returns a predictor by its name in ``PREDICTORS``. Raises ValueError for another one."""
    if name == "nearest":
        return NearestLengths(0.9)
    if name not in PREDICTORS:
        raise ValueError(f"no predictor {name!r}; known are {', '.join(PREDICTORS)}")
    return LearnedLengths(0.9, conditional=name.endswith("conditional"))


def _prediction(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    """Each answer is predicted before it is learned: by its 0.9 quantile, at its beginning and after half of it."""
    made = _workload(cell, profile)
    predictor = _lengths(cell, profile, made, predictor_of(cell.name))
    begun, half, true = [], [], list(made.lengths)
    for request, length in zip(made.requests, made.lengths, strict=True):
        begun.append(predictor.predict(Life(request)))
        half.append(predictor.predict(Life(request, [0] * (length // 2))))
        predictor.learn(Life(request, [0] * length, whole=True))
    true_N, begun_N, half_N = (np.array(each, np.float64) for each in (true, begun, half))
    return {
        "mean_error": float(np.abs(begun_N - true_N).mean()),
        "mean_error_half": float(np.abs(half_N - true_N).mean()),
        "coverage": float((true_N <= begun_N).mean()),
        "coverage_half": float((true_N <= half_N).mean()),
        "rank_correlation": _rank_correlation(begun_N, true_N),
        "mean_length": float(true_N.mean()),
    }


def _rank_correlation(a_N: Any, b_N: Any) -> float:
    a_rank_N, b_rank_N = (np.argsort(np.argsort(each, kind="stable"), kind="stable") for each in (a_N, b_N))
    return float(np.corrcoef(a_rank_N, b_rank_N)[0, 1]) if len(a_N) > 1 else 0.0


FLEETS: Final = {
    "round robin": FleetRules("round-robin"),
    "freeness": FleetRules(),
    "freeness and moves": FleetRules(moves_every_s=0.5, least_gap=10.0),
    "drain": FleetRules(drains=[(10.0, 0)]),
    "drain by moves": FleetRules(moves_every_s=0.1, drains=[(10.0, 0)]),
}
"""Four replicas that share bursty conversations; the last two empty one of them after 10 s."""
REPLICAS: Final = 4


def _fleet(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    rng = np.random.default_rng(cell.seed)
    sizes, _ = sizes_of(cell.workload, cell.requests, rng, SHRINK)
    made = at_load(sizes, bursty_gaps(rng, cell.requests), REPLICAS * cell.load, profile)
    engines = [
        Engine(profile, Fused(), LIMITS, max_requests=cell.requests, expires=False, adapts=False)
        for _ in range(REPLICAS)
    ]
    found = Fleet(engines, profile, made.requests, made.lengths, FLEETS[cell.name]).serve()
    pauses_s = found.pauses_s or [0.0]
    return {
        **report(found.run),
        "moves": len(found.pauses_s),
        "longest_pause_s": max(pauses_s),
        "emptied_after_s": found.emptied_s[0] - 10.0 if found.emptied_s else None,
    }


GOALS: Final = {"TTFT 1 s, TPOT 0.1 s": Goals(1.0, 0.1), "TTFT 1 s, TPOT 0.07 s": Goals(1.0, 0.07)}


def _placement(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    sizes, _ = sizes_of(cell.workload, cell.requests, cell.seed, SHRINK)
    rates = [
        (str(each), bool(each.prefill), best_rate(each, sizes, GOALS[cell.name], profile, LIMITS, seed=cell.seed))
        for each in placements(2)
    ]
    return {
        "rates": [{"placement": name, "apart": apart, "requests_per_s": rate} for name, apart, rate in rates],
        "fused": max(rate for _, apart, rate in rates if not apart),
        "apart": max(rate for _, apart, rate in rates if apart),
    }


PREFIXES: Final = {"each alone": 0, "shared": 200}
"""Blocks that may keep beginnings of prompts for later requests."""
SYSTEM_TOKENS: Final = 200
"""Tokens with which every prompt of a class begins."""


def _prefix(cell: Cell, profile: GenerationProfile) -> dict[str, Any]:
    rng = np.random.default_rng(cell.seed)
    sizes, _ = sizes_of(cell.workload, cell.requests, rng, SHRINK)
    gaps_N = poisson_gaps(rng, len(sizes.prompts_N))
    made = at_load(sizes, gaps_N, cell.load, profile, system_tokens=SYSTEM_TOKENS)
    limits = replace(LIMITS, prefix_blocks=PREFIXES[cell.name])
    found = report(served(made, profile, "fused", None, limits))
    prompts = sum(len(request.prompt) for request in made.requests)
    return {**found, "shared_share": found["shared_tokens"] / prompts}
