"""Recorded arrivals: the Azure Functions 2021 and the Azure LLM inference 2023 traces, in their published CSV formats.

Both are CC-BY 4.0 data sets of Microsoft Azure (github.com/Azure/AzurePublicDataset). A reader returns arrival times in
seconds from the first one, (N,) ascending.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]

MAX_ROWS: Final = 20_000_000
"""Eight bytes a row are kept; more rows than the published files have."""


class TraceError(ValueError):
    """No trace, or a line that cannot be read. Says which."""


def read_azure_functions_2021(path: Path) -> Float64s:
    """One row per invocation: app, func, end_timestamp, duration (seconds). An arrival is end - duration."""
    return _read(path, ("end_timestamp", "duration"), _invocation_s)


def read_azure_llm_2023(path: Path) -> Float64s:
    """One row per request: TIMESTAMP (UTC, seven decimals), ContextTokens, GeneratedTokens."""
    return _read(path, ("TIMESTAMP",), _timestamp_s)


READERS: Final[Mapping[str, tuple[str, Callable[[Path], Float64s]]]] = {
    "azure-functions-2021": ("end_timestamp", read_azure_functions_2021),
    "azure-llm-2023": ("TIMESTAMP", read_azure_llm_2023),
}
"""Format name: a column that only this format has, and its reader."""


def read_trace(path: Path) -> Float64s:
    """Either format, told apart by the header. Raises TraceError for a file that is neither, OSError for none."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        header = next(csv.reader([file.readline(1 << 16)]), [])
    for column, reader in READERS.values():
        if column in header:
            return reader(path)
    raise TraceError(f"{path.name}: no trace of a known format ({', '.join(READERS)})")


def _invocation_s(row: Mapping[str, str]) -> float:
    end_s, duration_s = float(row["end_timestamp"]), float(row["duration"])
    if duration_s < 0:
        raise ValueError("a negative duration")
    return end_s - duration_s


def _timestamp_s(row: Mapping[str, str]) -> float:
    whole, _, decimals = row["TIMESTAMP"].partition(".")
    at_s = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
    return at_s + (float(f"0.{decimals}") if decimals else 0.0)


def _read(path: Path, columns: tuple[str, ...], arrival_s: Callable[[Mapping[str, str]], float]) -> Float64s:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = set(columns) - set(rows.fieldnames or ())
            if missing:
                raise TraceError(f"{path.name}: no column {', '.join(sorted(missing))}")
            arrivals_N = np.fromiter(_arrivals(path, rows, arrival_s), dtype=np.float64)
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path.name}: not a CSV file ({error})") from error
    if not len(arrivals_N):
        raise TraceError(f"{path.name}: a trace without rows")
    arrivals_N.sort()
    arrivals_N -= float(arrivals_N[0])
    return arrivals_N


def _arrivals(
    path: Path, rows: "csv.DictReader[str]", arrival_s: Callable[[Mapping[str, str]], float]
) -> Iterator[float]:
    for count, row in enumerate(rows):
        if count >= MAX_ROWS:
            raise TraceError(f"{path.name}: over {MAX_ROWS:,} rows")
        try:
            at_s = arrival_s(row)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise TraceError(f"{path.name}, line {rows.line_num}: {error}") from error
        if not math.isfinite(at_s):
            raise TraceError(f"{path.name}, line {rows.line_num}: a time that is not finite")
        yield at_s
