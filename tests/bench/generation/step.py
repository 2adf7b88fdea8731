"""A step of the model against its floor, and a prompt of 256 tokens against the processor's peak.

The floor of a step that decodes is the packed products alone, in the same run: the five products of each layer and the
head, on as many rows. The peak is that of one large product in the same number type. A note per number of rows says
what the parts of such a step take, in further steps of the same run.

    python -m tests.bench.generation.step --model smollm2 --number-type float32 --out step.json
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from isthmus.cloud.elastic.model.packed import PackedLinear
from isthmus.cloud.generation.model import llama
from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import make_cache
from isthmus.cloud.generation.model.kv import Span
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.slots import SlotCache
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.prepare.profiler import _fill, _step
from isthmus.cloud.generation.scheduling.policy import Limits
from tests.bench.harness import Report, interleaved, shown

ROWS, CONTEXT, PROMPT = (1, 4, 16), 128, 256


@torch.inference_mode()
def products(model: Llama, rows: int) -> None:
    """Runs the products of one step alone."""
    config = model.config
    narrow_TW = torch.zeros(rows, config.width, dtype=model.dtype)
    heads_TX = torch.zeros(rows, config.heads * config.head_dim, dtype=model.dtype)
    wide_TM = torch.zeros(rows, config.mlp_width, dtype=model.dtype)
    for block in model.blocks:
        block.qkv(narrow_TW), block.output(heads_TX), block.gate_up(narrow_TW), block.down(wide_TM)  # type: ignore[operator]
    model.head(narrow_TW)


class Decode:
    """Steps of ``rows`` rows that decode at about CONTEXT tokens each."""

    def __init__(self, model: Llama, rows: int) -> None:
        self._model, self._rows, self._end = model, rows, CONTEXT
        self._cache = make_cache("slots", model, Limits(rows=rows, blocks=64 * rows))
        for id in range(rows):
            _fill(model, self._cache, Span(id, 0, 0, CONTEXT))

    def __call__(self) -> None:
        _step(self._model, self._cache, [Span(id, id, self._end, 1) for id in range(self._rows)])
        self._end += 1


def parts(step: Decode, repeats: int) -> dict[str, float]:
    """Returns the median processor seconds of each part of a step, and of the whole step while they are timed."""
    took_s: dict[str, list[float]] = defaultdict(list)
    spent_s: dict[str, float] = {}

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            began_s = time.process_time()
            found = run(*given, **named)
            spent_s[name] = spent_s.get(name, 0.0) + time.process_time() - began_s
            return found

        return call

    with ExitStack() as stack:
        for name, owner, what in (
            ("products", PackedLinear, "forward"),
            ("attention", SlotCache, "attend"),
            ("tables of blocks", SlotCache, "begin"),
            ("norms", functional, "rms_norm"),
            ("rotary", llama, "rotated"),
            ("SiLU", functional, "silu"),
        ):
            stack.enter_context(mock.patch.object(owner, what, timed(name, getattr(owner, what))))
        whole = timed("step", step)
        for _ in range(repeats):
            spent_s.clear()
            whole()
            for name, seconds in spent_s.items():
                took_s[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in took_s.items()}


def prefill(model: Llama) -> None:
    _step(model, make_cache("slots", model, Limits()), [Span(0, 0, 0, PROMPT)])


def operations(config: LlamaConfig, tokens: int) -> float:
    """Returns the multiplications and additions of a prompt, with one token's logits."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = config.width * (2 * queries + 2 * keys) + 3 * config.width * config.mlp_width
    attention = tokens * (tokens + 1) // 2 * 2 * queries
    return 2.0 * (config.layers * (tokens * layer + attention) + config.width * config.vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--number-type", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig.read(asked.model)
    model = load_llama(asked.model, config, number_type=asked.number_type)
    side = 2_048
    left, right = (torch.randn(side, side).to(model.dtype) for _ in range(2))
    candidates: dict[str, Any] = {"peak": lambda: left @ right, "prefill": lambda: prefill(model)}
    for rows in ROWS:
        candidates[f"step {rows}"] = Decode(model, rows)
        candidates[f"floor {rows}"] = lambda rows=rows: products(model, rows)
    timed = interleaved(candidates, repeats=asked.repeats)
    report = Report(
        "steps", {"model": asked.model.name, "number_type": asked.number_type, "context": CONTEXT}, ("torch",)
    )
    peak = 2.0 * side**3 / timed["peak"].cpu_s.median
    for rows in ROWS:
        ratio = timed[f"step {rows}"].cpu_s.median / timed[f"floor {rows}"].cpu_s.median
        report.rows.append(
            {
                "what": f"{rows} rows decode",
                "cpu_s": timed[f"step {rows}"].cpu_s.to_json(),
                "floor_s": timed[f"floor {rows}"].cpu_s.to_json(),
                "figure": ratio,
            }
        )
    for rows in ROWS:
        found = parts(candidates[f"step {rows}"], asked.repeats)
        report.rows[ROWS.index(rows)]["parts_s"] = found
        said = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in found.items())
        report.notes.append(f"{rows} rows, CPU ms of each part: {said}")
    reached = operations(config, PROMPT) / timed["prefill"].cpu_s.median / peak
    report.rows.append(
        {"what": f"prompt of {PROMPT}", "cpu_s": timed["prefill"].cpu_s.to_json(), "floor_s": None, "figure": reached}
    )
    report.floors["peak of one product, GFLOP/s"] = peak / 1e9
    columns: dict[str, Any] = {
        "what": lambda row: row["what"],
        "CPU ms": lambda row: shown(row["cpu_s"], 1e3),
        "floor, CPU ms": lambda row: "" if row["floor_s"] is None else shown(row["floor_s"], 1e3),
        "times the floor, or share of the peak": lambda row: f"{row['figure']:.2f}",
    }
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
