"""Recorded arrivals: the Azure Functions trace of 2021 and the Azure inference traces of 2023, 2024 and 2025, as CSV.

They are CC-BY 4.0 data sets of Microsoft Azure (github.com/Azure/AzurePublicDataset). A reader returns arrival times in
seconds from the first one, (N,) ascending. Files that a spreadsheet or an editor has saved again are read too: with a
byte order mark, other line ends, semicolons or tabs, quotes, and blanks around fields.
"""

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from isthmus.data.files import open_text

Float64s = npt.NDArray[np.float64]

MAX_ROWS: Final = 100_000_000
"""More rows than the published files have; eight bytes per row are kept."""

_TIME: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,12}))?\s*(Z|UTC|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)


class TraceError(ValueError):
    """A file that is no trace, or a line of it that cannot be read. The message says which."""


def read_azure_functions_2021(path: Path) -> Float64s:
    """Read one row per invocation: app, func, end_timestamp, duration (seconds). An arrival is end - duration."""
    return _read(path, ("end_timestamp", "duration"), _invocation_s)


def read_azure_inference(path: Path) -> Float64s:
    """Read one row per request: TIMESTAMP and the numbers of tokens.

    Times are UTC unless they name an offset: 2023-11-16 18:17:03.9799600, 2024-05-10 00:00:00.009930+00:00 or
    2024-10-15T12:00:00.250Z, as the releases of 2023, 2024 and 2025 write them.
    """
    return _read(path, ("TIMESTAMP",), _timestamp_s)


READERS: Final[Mapping[str, tuple[str, Callable[[Path], Float64s]]]] = {
    "azure-functions-2021": ("end_timestamp", read_azure_functions_2021),
    "azure-inference-2023 to 2025": ("TIMESTAMP", read_azure_inference),
}
"""Format name: a column that only this format has, and its reader."""


def read_trace(path: Path) -> Float64s:
    """Read either format, recognised by the header. Raises TraceError for other files, OSError if there is none."""
    with _opened(path) as (header, _):
        readers = [reader for column, reader in READERS.values() if _folded(column) in header]
    if not readers:
        raise TraceError(f"{path.name}: no trace of a known format ({', '.join(READERS)})")
    return readers[0](path)


def read_azure_tokens(path: Path) -> Float64s:
    """Read one row per request of an inference trace: arrival in seconds, prompt tokens, generated tokens, (N, 3).

    Rows are ascending by arrival, from 0 on. Raises TraceError for another file, or numbers of tokens below 1.
    """
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    with _opened(path) as (header, rows):
        missing = [column for column in columns if _folded(column) not in header]
        if missing:
            raise TraceError(f"{path.name}: no column {', '.join(missing)}")
        places = [header.index(_folded(column)) for column in columns]
        lines = [row for row in rows if any(field.strip() for field in row)]
        arrivals_N = list(_arrivals(path, iter(lines), places, lambda at, prompt, generated: _timestamp_s(at)))
        counts_2N = [list(_arrivals(path, iter(lines), places[at : at + 1], _whole)) for at in (1, 2)]
    rows_N3 = np.array([arrivals_N, *counts_2N]).T
    if not len(rows_N3) or not (rows_N3[:, 1:] >= 1).all():
        raise TraceError(f"{path.name}: each request must have a prompt and an answer of at least one token")
    rows_N3 = rows_N3[np.argsort(rows_N3[:, 0], kind="stable")]
    rows_N3[:, 0] -= rows_N3[0, 0]
    return rows_N3


def _invocation_s(end: str, duration: str) -> float:
    end_s, duration_s = _number(end), _number(duration)
    if duration_s < 0:
        raise ValueError("a negative duration")
    return end_s - duration_s


def _whole(text: str) -> float:
    try:
        return float(int(text))
    except ValueError:
        raise ValueError(f"{text[:64]!r} is no number of tokens") from None


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def _timestamp_s(text: str) -> float:
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is no time such as 2024-05-10 00:00:00.25+00:00")
    day, hours, minutes, seconds, decimals, zone = found.groups()
    if int(hours) > 23 or int(minutes) > 59 or int(seconds) > 60:
        raise ValueError(f"{text[:40]!r} is no time of a day")
    whole_s = _day_s(day) + 3600 * int(hours) + 60 * int(minutes) + int(seconds) - _offset_s(zone)
    return whole_s + (float(f"0.{decimals}") if decimals else 0.0)


@lru_cache(maxsize=64)
def _day_s(day: str) -> int:
    return 86_400 * (date.fromisoformat(day).toordinal() - date(1970, 1, 1).toordinal())


@lru_cache(maxsize=64)
def _offset_s(zone: str | None) -> int:
    if zone in (None, "Z", "UTC"):
        return 0
    digits = zone[1:].replace(":", "").ljust(4, "0")
    return (-1 if zone[0] == "-" else 1) * (3600 * int(digits[:2]) + 60 * int(digits[2:]))


def _read(path: Path, columns: Sequence[str], arrival_s: Callable[..., float]) -> Float64s:
    with _opened(path) as (header, rows):
        missing = [column for column in columns if _folded(column) not in header]
        if missing:
            raise TraceError(f"{path.name}: no column {', '.join(missing)}")
        places = [header.index(_folded(column)) for column in columns]
        arrivals_N = np.fromiter(_arrivals(path, rows, places, arrival_s), dtype=np.float64)
    if not len(arrivals_N):
        raise TraceError(f"{path.name}: a trace without rows")
    arrivals_N.sort()
    arrivals_N -= float(arrivals_N[0])
    return arrivals_N


def _arrivals(
    path: Path, rows: Iterator[list[str]], places: Sequence[int], arrival_s: Callable[..., float]
) -> Iterator[float]:
    for line, fields in enumerate(rows, start=2):
        if not any(field.strip() for field in fields):
            continue
        if line > MAX_ROWS:
            raise TraceError(f"{path.name}: over {MAX_ROWS:,} rows")
        try:
            at_s = arrival_s(*(fields[place].strip() for place in places))
        except (ValueError, IndexError, OverflowError) as error:
            raise TraceError(f"{path.name}, line {line}: {error}") from error
        if not math.isfinite(at_s):
            raise TraceError(f"{path.name}, line {line}: a time that is not finite")
        yield at_s


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """Yield the folded names of the header, and the rows. Raises TraceError if the file is not CSV."""
    try:
        with open_text(path, newline="") as file:
            first = file.readline(1 << 16)
            delimiter = max(",;\t", key=first.count)
            header = [_folded(name) for name in next(csv.reader([first], delimiter=delimiter), [])]
            yield header, csv.reader(file, delimiter=delimiter)
    except TraceError:
        raise
    except (ValueError, csv.Error) as error:
        raise TraceError(f"{path.name}: not a CSV file ({error})") from error


def _folded(name: str) -> str:
    return name.strip().casefold()
