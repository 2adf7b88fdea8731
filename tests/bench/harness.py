"""Interleaved runs, medians with quartiles, a table on the terminal and the same results as JSON.

Candidates take turns within each repeat, so that a slower machine slows all of them. Both wall and CPU seconds are
kept: on a busy machine only CPU seconds measure the code.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.bench import machine


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    repeats: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Return the spread of ``values``. Raises ValueError if there are none."""
        if not values:
            raise ValueError("nothing was measured")
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, len(values))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.low, "q3": self.high, "repeats": self.repeats}


@dataclass(frozen=True)
class Timing:
    wall_s: Spread
    cpu_s: Spread

    def to_json(self) -> dict[str, dict[str, float]]:
        return {"wall_s": self.wall_s.to_json(), "cpu_s": self.cpu_s.to_json()}


def interleaved(candidates: Mapping[str, Callable[[], object]], *, repeats: int, warmups: int = 1) -> dict[str, Timing]:
    """Run every candidate ``warmups`` times unmeasured, then all in turn, ``repeats`` times."""
    wall_s: dict[str, list[float]] = {name: [] for name in candidates}
    cpu_s: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(warmups + repeats):
        for name, run in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if repeat >= warmups:
                wall_s[name].append(wall)
                cpu_s[name].append(cpu)
    return {name: Timing(Spread.of(wall_s[name]), Spread.of(cpu_s[name])) for name in candidates}


@dataclass
class Report:
    """The results of one command. ``rows`` are plain JSON values; ``columns`` selects and formats the table's."""

    name: str
    config: dict[str, Any]
    packages: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    load: machine.Load = field(default_factory=machine.Load)

    def finish(self, columns: Mapping[str, Callable[[dict[str, Any]], str]], out: Path | None) -> None:
        """Print the table and write the JSON."""
        load = self.load.so_far()
        facts = machine.facts(self.packages)
        quiet = (
            "quiet machine" if load["quiet"] else f"BUSY machine, other processes used {load['others_share']:.0%} of it"
        )
        title = f"{self.name}: {facts['processor']}, {facts['cores']} cores, {facts['threads']} thread, {quiet}"
        table = Table(*columns, title=title, title_justify="left")
        for row in self.rows:
            table.add_row(*(escape(show(row)) for show in columns.values()))
        console = Console(width=None if Console().is_terminal else 160)
        console.print(table)
        for name, value in self.floors.items():
            console.print(f"{name}: {value:.4g}", highlight=False)
        for note in self.notes:
            console.print(note, highlight=False)
        if out is not None:
            found = {
                "name": self.name,
                "config": self.config,
                "machine": facts,
                "load": load,
                "floors": self.floors,
                "rows": self.rows,
                "notes": self.notes,
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shown(spread: Mapping[str, float], scale: float = 1.0, digits: int = 3) -> str:
    """Format a spread's JSON as "median (q1 to q3)"."""
    median, low, high = (f"{spread[key] * scale:.{digits}g}" for key in ("median", "q1", "q3"))
    return f"{median} ({low} to {high})"
