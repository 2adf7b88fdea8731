"""PURE: gains of seeds as text."""

import statistics
from collections.abc import Sequence


def in_points(gains: Sequence[float]) -> str:
    """Return mean and standard error over seeds, in points, of gains that are shares; one seed has no error.

    Example:
        >>> in_points([0.01, 0.03])
        '+2.00 ± 1.00'
        >>> in_points([-0.005])
        '-0.50'
    """
    points = [100 * gain for gain in gains]
    mean = f"{statistics.fmean(points):+.2f}"
    return mean if len(points) < 2 else f"{mean} ± {statistics.stdev(points) / len(points) ** 0.5:.2f}"
