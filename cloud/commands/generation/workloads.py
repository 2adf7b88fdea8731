"""Workloads by their names on the command line."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from isthmus.cloud.generation.scheduling.workload import Sizes, chat_sizes, lmaas_sizes, trace_sizes
from isthmus.command_line import did_you_mean
from isthmus.data.traces import read_azure_tokens

_MADE = {"lmaas": lmaas_sizes, "chat": chat_sizes}


def sizes_of(
    workload: str, requests: int, seed: int | np.random.Generator, shrink: float
) -> tuple[Sizes, npt.NDArray[np.float64] | None]:
    """Returns lengths of requests, and the gaps between their arrivals if a trace was recorded with them.

    Raises ValueError for a workload that is neither made nor a file.
    """
    if workload in _MADE:
        return _MADE[workload](np.random.default_rng(seed), requests), None
    if Path(workload).is_file():
        rows_N3 = read_azure_tokens(Path(workload))[:requests]
        return trace_sizes(rows_N3, shrink=shrink), np.diff(rows_N3[:, 0], prepend=0.0)
    known = did_you_mean(workload, _MADE)
    raise ValueError(f"no workload {workload!r}: give lmaas, chat or the CSV file of a trace.{known}")
