"""PURE: when to send. Open loop: the times do not depend on the answers, so a slow server does not slow the load."""

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]


def poisson(rate_per_s: float, duration_s: float, seed: int) -> Float64s:
    """Return the times of a Poisson process within ``duration_s``, ascending, in seconds. Shape (N,).

    Raises ValueError if rate or duration is not positive.
    """
    if not rate_per_s > 0 or not duration_s > 0:
        raise ValueError("rate and duration must be positive")
    rng = np.random.default_rng(seed)
    # Given their number, the times of a Poisson process are uniform.
    times_N: Float64s = np.sort(rng.uniform(0.0, duration_s, rng.poisson(rate_per_s * duration_s)))
    return times_N


def replayed(trace_N: Float64s, rate_per_s: float, duration_s: float) -> Float64s:
    """Return a recorded trace's first arrivals, sped up so that its mean rate is ``rate_per_s``. Shape (N,).

    Bursts and lulls keep their shape. Raises ValueError for a trace of fewer than two arrivals, or of no length.
    """
    if not rate_per_s > 0 or not duration_s > 0:
        raise ValueError("rate and duration must be positive")
    if len(trace_N) < 2 or not np.ptp(trace_N) > 0:
        raise ValueError("the trace has no two arrivals at different times")
    sorted_N = np.sort(trace_N)
    times_N: Float64s = (sorted_N - sorted_N[0]) * ((len(sorted_N) - 1) / np.ptp(sorted_N) / rate_per_s)
    return times_N[times_N < duration_s]
