"""The machine of a measurement: its facts, its peak rates, and its load by other processes meanwhile."""

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench import THREADS

ROOT = Path(__file__).resolve().parents[2]
QUIET_SHARE = 0.05
"""A machine is quiet if other processes used less than this share of its processors."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def facts(packages: tuple[str, ...]) -> dict[str, Any]:
    """Return processor, memory, versions and the measured commit."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("numpy", *packages)},
        "commit": _commit(),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": THREADS,
    }


def product_rate(dtype: npt.DTypeLike, size: int = 1024) -> float:
    """Return operations per CPU second of a square matrix product: the peak rate of one thread."""
    rng = np.random.default_rng(0)
    left, right = rng.random((size, size)).astype(dtype), rng.random((size, size)).astype(dtype)
    out = np.empty_like(left)
    return 2 * size**3 / _median_cpu_s(lambda: np.matmul(left, right, out=out))


def read_rate(size_bytes: int = 256 << 20) -> float:
    """Return bytes per CPU second of a sequential read of an array much larger than the caches."""
    data = np.ones(size_bytes // 8)
    return data.nbytes / _median_cpu_s(data.sum)


class Load:
    """The load that other processes put on the processors between ``begin`` and ``so_far``."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._all_s = _busy_s()
        self._own_s = _own_s()
        self._average = os.getloadavg()

    def so_far(self) -> dict[str, Any]:
        """Return the load. ``others_share`` is the share of all processors' time that other processes used.

        Children count as other processes until they end, so call this afterwards.
        """
        wall_s = time.perf_counter() - self._began_s
        busy_s = _busy_s() - self._all_s
        others = max(0.0, busy_s - (_own_s() - self._own_s)) / (wall_s * (os.cpu_count() or 1))
        return {
            "load_average_before": self._average,
            "load_average_after": os.getloadavg(),
            "others_share": round(others, 3),
            "quiet": others < QUIET_SHARE,
        }


def _median_cpu_s(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    took_s = []
    for _ in range(repeats):
        began_s = time.thread_time()
        run()
        took_s.append(time.thread_time() - began_s)
    return statistics.median(took_s)


def _own_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_s() -> float:
    """Return user, nice, system and interrupt time of all processors since boot; 0 if the system does not report it."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, interrupt, soft = (int(field) for field in fields[:7])
    return (user + nice + system + interrupt + soft) / _TICKS_PER_S


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Return this checkout's commit, with a plus if files differ from it; an empty string outside of a checkout."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip()
