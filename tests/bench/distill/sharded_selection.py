"""Selection over a public set in shards, by this process and on Ray, against one selection over all of it.

The set is generated once into ``--folder``: outputs that spread over several classes, in float16. Four ways take turns:
single shards, each alone; all shards as one memory-mapped set (``select_cosine``); the shards one after another in this
process; and the shards on a Ray cluster of this machine. All must make equal picks, or the command fails. Seconds per
million are wall seconds times the processes that computed.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.personalise.elsewhere.shards_on_ray import ShardsOnRay
from isthmus.distill.selection import Shards, ShardsHere, select_cosine, select_cosine_in_shards
from isthmus.distill.selection.sharded import Probabilities
from isthmus.distill.training.probability_shards import MANIFEST, open_shards, write_shards
from tests.bench.harness import Report

Indices = npt.NDArray[np.int64]


class Joined:
    """Shards as one array of rows, for a selection that knows no shards."""

    ndim = 2

    def __init__(self, shards: list[Probabilities]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])
        self.shape = (int(self._starts[-1]), shards[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Indices) -> Probabilities:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        shard_M = np.searchsorted(self._starts, rows, side="right") - 1
        first, last = int(shard_M[0]), int(shard_M[-1])
        parts = []
        for number in range(first, last + 1):
            inside = rows[shard_M == number] - self._starts[number]
            whole = len(inside) and inside[-1] - inside[0] == len(inside) - 1
            parts.append(self._shards[number][slice(inside[0], inside[-1] + 1) if whole else inside])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def generated(samples: int, shard_samples: int, classes: int, seed: int) -> Iterator[Probabilities]:
    """Yield one shard after another: the softmax of normal logits of deviation 3."""
    for number, start in enumerate(range(0, samples, shard_samples)):
        rng = np.random.default_rng([seed, number])
        likelihood_MC = rng.standard_normal((min(shard_samples, samples - start), classes), np.float32)
        likelihood_MC *= 3
        np.exp(likelihood_MC, out=likelihood_MC)
        likelihood_MC /= likelihood_MC.sum(axis=1, keepdims=True)
        yield likelihood_MC.astype(np.float16)


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the set; it is generated if it is not there.")],
    samples: int = 100_000_000,
    shard_samples: int = 1_000_000,
    prototypes: int = 300,
    classes: int = 28,
    samples_per_row: int = 10,
    alone: Annotated[int, typer.Option(help="Shards that are timed alone.")] = 5,
    cpus: Annotated[int, typer.Option(help="CPUs of the Ray cluster. 0: all.")] = 0,
    generate_only: Annotated[bool, typer.Option(help="Generate the set, and measure nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare selection by shards with one selection over the whole set."""
    cpus = cpus or os.cpu_count() or 1
    if not (folder / MANIFEST).exists():
        write_shards(folder, generated(samples, shard_samples, classes, seed=0))
    if generate_only:
        return
    began_s = time.perf_counter()
    files = open_shards(folder)
    shards = [files.shard(number).read() for number in range(len(files.sizes))]
    opened_s = time.perf_counter() - began_s
    samples = sum(files.sizes)
    config = {"samples": samples, "shards": len(shards), "dtype": shards[0].dtype.name, "prototypes": prototypes}
    config |= {"classes": files.classes, "samples_per_row": samples_per_row, "ray_cpus": cpus, "seed": 0}
    report = Report("sharded selection", config, ("ray",))
    report.floors = {"read, hash and compare all files, s": opened_s}
    prototypes_KC = np.random.default_rng(1).dirichlet(np.full(files.classes, 0.3), prototypes).astype(np.float32)
    picks: dict[str, Indices] = {}

    def timed(what: str, of: int, processes: int, select: Callable[[], Indices]) -> float:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        picks[what] = select()
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        per_million_s = wall_s * processes / of * 1e6
        row = {"what": what, "samples": of, "processes": processes, "wall_s": wall_s, "own_cpu_s": cpu_s}
        report.rows.append(row | {"s_per_million": per_million_s})
        return per_million_s

    def whole_of(public: Any) -> Callable[[], Indices]:
        return lambda: select_cosine(prototypes_KC, public, samples_per_row)

    def sharded(way: Shards) -> Callable[[], Indices]:
        return lambda: select_cosine_in_shards(prototypes_KC, way, samples_per_row)

    singles = np.linspace(0, len(shards) - 1, min(alone, len(shards))).astype(int).tolist()
    of_one_s = float(np.median([timed(f"shard {n} alone", len(shards[n]), 1, whole_of(shards[n])) for n in singles]))
    timed("one selection over all", samples, 1, whole_of(Joined(shards)))
    timed("shards, this process", samples, 1, sharded(ShardsHere(shards)))
    began_s = time.perf_counter()
    cluster.connect(cluster.LOCAL, cpus)
    report.floors["start of the Ray cluster, s"] = time.perf_counter() - began_s
    try:
        on_ray = ShardsOnRay(open_shards(folder.absolute()), cpus=cpus)
        for turn in ("first", "second"):
            timed(f"shards, Ray, {turn} time", samples, cpus, sharded(on_ray))
    finally:
        cluster.leave()
    whole = picks["one selection over all"]
    for row in report.rows:
        row["times_one_shard"] = row["s_per_million"] / of_one_s
        if row["samples"] == samples and not np.array_equal(picks[row["what"]], whole):
            raise typer.Exit(f"{row['what']}: other picks than one selection over all")
    report.notes.append(f"All {len(whole)} picks are equal, in the same order.")
    report.finish(
        {
            "what": lambda row: row["what"],
            "samples": lambda row: f"{row['samples']:,}",
            "processes": lambda row: str(row["processes"]),
            "wall s": lambda row: f"{row['wall_s']:.2f}",
            "s per million": lambda row: f"{row['s_per_million']:.3f}",
            "times one shard's": lambda row: f"{row['times_one_shard']:.2f}",
        },
        out,
    )


if __name__ == "__main__":
    typer.run(main)
