"""Resident memory before and after preempted requests are swapped, with the pool in memory and in mapped files.

    python -m tests.bench.generation.swapping --out swapping.json

The cache has the shape of SmolLM2-135M in bfloat16 (23,040 bytes per token); no model is needed. Anonymous memory holds
the cache and a pool in memory. Pages of mapped files are counted apart: the system may write them out at any time.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from isthmus.cloud.generation.model.kv import KVShape
from isthmus.cloud.generation.model.slots import SlotCache
from isthmus.cloud.generation.model.swap import SwapPool
from tests.bench.harness import Report

SHAPE = KVShape(layers=30, kv_heads=3, head_dim=64, dtype=torch.bfloat16)


def resident_mb() -> dict[str, float]:
    """Returns this process's resident memory by kind, in MB."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024 / 1e6
    return {"anonymous_mb": found["RssAnon"], "mapped_mb": found["RssFile"] + found["RssShmem"]}


def swapped(requests: int, tokens: int, away: int, folder: Path | None) -> list[dict[str, Any]]:
    """Fills a cache and swaps ``away`` requests. Returns a row per state; memory is that beyond the start."""
    generator = torch.Generator().manual_seed(0)
    began = resident_mb()
    cache, pool = SlotCache(SHAPE), SwapPool(requests * tokens, folder=folder)
    rows: list[dict[str, Any]] = []

    def note(state: str) -> None:
        now = {name: value - began[name] for name, value in resident_mb().items()}
        where = "memory" if folder is None else "files"
        rows.append({"pool": where, "state": state, "cache_mb": cache.bytes / 1e6, **now})

    size = (SHAPE.layers, SHAPE.kv_heads, tokens, SHAPE.head_dim)
    for id in range(requests):
        keys, values = (torch.randn(size, generator=generator).to(SHAPE.dtype) for _ in range(2))
        cache.place(id, (), keys, values)
    del keys, values
    note(f"{requests} requests")
    for id in range(requests - away, requests):
        pool.put(id, *cache.taken(id))
    pool._thread.submit(lambda: None).result()  # all copies are made, and freed memory is given back
    pool.close()
    note(f"{away} of them swapped")
    return rows


def swapped_apart(requests: int, tokens: int, away: int, folder: Path | None) -> list[dict[str, Any]]:
    """The same in a process of its own: what others have freed and kept for themselves is not in its figures."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(swapped, requests, tokens, away, folder).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1_024, help="Tokens of each request.")
    parser.add_argument("--away", type=int, default=12, help="Requests that are swapped.")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    config = {"requests": asked.requests, "tokens": asked.tokens, "away": asked.away}
    report = Report("memory of swapped requests", config, ("torch",))
    with TemporaryDirectory() as name:
        for folder in (None, Path(name)):
            report.rows += swapped_apart(asked.requests, asked.tokens, asked.away, folder)
    columns: dict[str, Any] = {name: lambda row, name=name: row[name] for name in ("pool", "state")}
    columns |= {name: lambda row, name=name: f"{row[name]:.0f}" for name in ("cache_mb", "anonymous_mb", "mapped_mb")}
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
