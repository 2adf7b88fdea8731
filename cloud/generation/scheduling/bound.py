"""PURE: bounds that no policy can pass, even one that knows all requests ahead.

Both relax the machine to a fluid: it offers one second per second, and a request needs at least its share of full
steps (``GenerationProfile.work_s``). Every real schedule is feasible there, so its figures cannot be better.
"""

import heapq
from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from isthmus.cloud.generation.scheduling.profile import GenerationProfile
from isthmus.cloud.generation.scheduling.workload import Workload

SLOTS: Final = 400


def mean_latency_bound_s(workload: Workload, profile: GenerationProfile, rows: int) -> float:
    """Returns a mean latency that no policy can go below with steps of at most ``rows`` rows.

    The larger of two: shortest remaining work first on the fluid machine, which is optimal there (Schrage 1968), and
    the mean time of the requests alone.
    """
    requests, lengths = workload.requests, workload.lengths
    if not requests:
        return 0.0
    work_s = [profile.work_s(len(each.prompt), length, rows) for each, length in zip(requests, lengths, strict=True)]
    alone_s = [profile.alone_s(len(each.prompt), length) for each, length in zip(requests, lengths, strict=True)]
    return max(_srpt_mean_s([each.arrival_s for each in requests], work_s), float(np.mean(alone_s)))


def goodput_bound(workload: Workload, profile: GenerationProfile, rows: int, *, slots: int = SLOTS) -> float:
    """Returns a share of requests in time that no policy can pass: a linear program over ``slots`` slots of time.

    A fraction of a request counts for its fraction of work that is done between its arrival and its deadline.
    """
    requests, lengths = workload.requests, workload.lengths
    if not requests:
        return 1.0
    start_s = requests[0].arrival_s
    ends_s = [each.deadline_s for each in requests if each.deadline_s is not None]
    if not ends_s:
        return 1.0
    slot_s = (max(ends_s) - start_s) / slots + 1e-9
    shares: list[tuple[int, int]] = []
    free = 0
    for at, request in enumerate(requests):
        if request.deadline_s is None:
            free += 1
            continue
        first, last = (int((each - start_s) / slot_s) for each in (request.arrival_s, request.deadline_s))
        shares += [(at, slot) for slot in range(first, last + 1)]
    work_s = np.array(
        [profile.work_s(len(each.prompt), length, rows) for each, length in zip(requests, lengths, strict=True)]
    )
    of_N, slot_N = np.array(shares).T
    columns_N = np.arange(len(shares))
    used = coo_matrix((work_s[of_N], (slot_N, columns_N)), shape=(slots, len(shares)))
    whole = coo_matrix((np.ones(len(shares)), (of_N, columns_N)), shape=(len(requests), len(shares)))
    found = linprog(
        -np.ones(len(shares)),
        A_ub=_stacked(used, whole),
        b_ub=np.concatenate((np.full(slots, slot_s), np.ones(len(requests)))),
        bounds=(0, None),
        method="highs",
    )
    return float((free - found.fun) / len(requests))


def _stacked(above: coo_matrix, below: coo_matrix) -> coo_matrix:
    return coo_matrix(
        (
            np.concatenate((above.data, below.data)),
            (np.concatenate((above.row, below.row + above.shape[0])), np.concatenate((above.col, below.col))),
        ),
        shape=(above.shape[0] + below.shape[0], above.shape[1]),
    ).tocsr()


def _srpt_mean_s(arrivals_s: Sequence[float], work_s: Sequence[float]) -> float:
    """Returns the mean time in the system of one machine that always serves the least remaining work."""
    queue: list[tuple[float, int]] = []
    total_s = now_s = 0.0
    coming = 0
    while coming < len(arrivals_s) or queue:
        if not queue:
            now_s = max(now_s, arrivals_s[coming])
        while coming < len(arrivals_s) and arrivals_s[coming] <= now_s:
            heapq.heappush(queue, (work_s[coming], coming))
            coming += 1
        left_s, at = heapq.heappop(queue)
        next_s = arrivals_s[coming] if coming < len(arrivals_s) else float("inf")
        if now_s + left_s <= next_s:
            now_s += left_s
            total_s += now_s - arrivals_s[at]
        else:
            heapq.heappush(queue, (left_s - (next_s - now_s), at))
            now_s = next_s
    return total_s / len(arrivals_s)
