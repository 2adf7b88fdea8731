"""Measures what a step of the model costs on this machine, and fits the profile's five coefficients to it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from scipy.optimize import nnls

from isthmus.cloud.elastic.scheduling.profile import MachineKey
from isthmus.cloud.generation.model.executor import make_cache
from isthmus.cloud.generation.model.kv import KVCache, Span
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import GenerationProfile, Load
from isthmus.cloud.processor import processor_name
from isthmus.distill.training.checkpoint import state_hash

ROWS: Final = (1, 4, 8, 16, 32)
CONTEXTS: Final = (64, 256)
CHUNKS: Final = (16, 64, 128, 256)
MIXED: Final = ((8, 128, 64), (16, 128, 112))
"""(rows that decode, their context, tokens of a prompt chunk beside them)."""
GOOD_ERROR: Final = 0.1
"""Mean relative error of the fit up to which a profile is trusted without a warning."""

OnStep = Callable[[int, int], None]
"""Called with the number of measured steps, and of all steps."""
Spans = tuple[tuple[int, int], ...]


def machine_key(model: Llama) -> MachineKey:
    """Returns what a profile measured with this model is valid for. The threads are torch's current setting."""
    on_gpu = model.device.type == "cuda"
    return MachineKey(
        processor=processor_name(),
        device=torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        threads=torch.get_num_threads(),
        number_type=str(model.dtype).removeprefix("torch."),
        model_hash=state_hash([model]),
    )


def measure(
    model: Llama,
    *,
    layout: str = "slots",
    rows: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    chunks: Sequence[int] = CHUNKS,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    on_step: OnStep = lambda done, all: None,
) -> GenerationProfile:
    """Returns the profile of this machine for the model, with ``layout`` of the KV cache.

    Within each repeat all kinds of steps take turns, so a machine that slows down affects all of them alike; the
    median of each kind counts. Kinds that the model's context cannot hold are left out. Raises ValueError if too few
    kinds are left to fit.
    """
    kinds = [kind for kind in _kinds(rows, contexts, chunks) if _fits(kind, model.config.context)]
    if len(kinds) < 5:
        raise ValueError("the model's context is too short for the steps to measure; give shorter ones")
    took_s: dict[Spans, list[float]] = {kind: [] for kind in kinds}
    done = 0
    for repeat in range(repeats + 1):
        for kind in kinds:
            seconds = _timed(model, layout, kind, clock)
            if repeat:  # the first round prepares memory and packed weights
                took_s[kind].append(seconds)
            done += 1
            on_step(done, (repeats + 1) * len(kinds))
    loads = [Load.of(kind) for kind in kinds]
    seconds_M = np.array([statistics.median(took_s[kind]) for kind in kinds])
    costs_5, error = fit(loads, seconds_M.tolist())
    values = model.config.kv_values_per_token
    return GenerationProfile(
        machine_key(model),
        *costs_5,
        kv_bytes_per_token=values * model.embedding.element_size(),
        error=error,
        grid=tuple(
            (load.decode_rows, load.context_tokens, load.prompt_tokens, load.pairs, seconds)
            for load, seconds in zip(loads, seconds_M.tolist(), strict=True)
        ),
    )


def fit(loads: Sequence[Load], seconds: Sequence[float]) -> tuple[tuple[float, float, float, float, float], float]:
    """Returns the five coefficients with the least relative squared error, none negative, and the mean relative error.

    A fixed cost or a prompt token's cost that comes out as 0 is set to a nanosecond, since a step always costs.
    """
    rows_M5 = np.array([(1.0, load.decode_rows, load.context_tokens, load.prompt_tokens, load.pairs) for load in loads])
    seconds_M = np.array(seconds)
    scale_5 = np.maximum(rows_M5.max(axis=0), 1e-12)  # so that all columns count alike
    scaled_5, _ = nnls(rows_M5 / scale_5 / seconds_M[:, None], np.ones(len(seconds)))
    costs_5 = scaled_5 / scale_5
    error = float(np.abs(rows_M5 @ costs_5 / seconds_M - 1).mean())
    fixed, row, context, prompt, pair = costs_5.tolist()
    return (max(fixed, 1e-9), row, context, max(prompt, 1e-9), pair), error


def _kinds(rows: Sequence[int], contexts: Sequence[int], chunks: Sequence[int]) -> list[Spans]:
    decodes = [((context - 1, 1),) * count for count in rows for context in contexts]
    prompts = [((0, chunk),) for chunk in chunks]
    later = [((chunks[-1], chunks[0]),)] if chunks else []
    mixed = [((context - 1, 1),) * count + ((0, chunk),) for count, context, chunk in MIXED]
    return [*decodes, *prompts, *later, *mixed]


def _fits(kind: Spans, context: int) -> bool:
    return all(first + count <= context for first, count in kind)


def _timed(model: Llama, layout: str, kind: Spans, clock: Callable[[], float]) -> float:
    """Runs one step of this kind, on a cache that holds what came before it, and returns its seconds.

    Rows that decode have decoded once before: nearly all of their steps follow one like them.
    """
    longest = max(first + count for first, count in kind)
    per_row = -(-longest // 16)
    cache = make_cache(layout, model, Limits(rows=len(kind), blocks=per_row * len(kind)))
    decodes = all(count == 1 and first > 1 for first, count in kind)
    for id, (first, _) in enumerate(kind):
        if first:
            _fill(model, cache, Span(id, 0, 0, first - decodes, tuple(range(id * per_row, (id + 1) * per_row))))
    spans, start = [], 0
    for id, (first, count) in enumerate(kind):
        spans.append(Span(id, start, first, count, tuple(range(id * per_row, (id + 1) * per_row))))
        start += count
    if decodes:
        _step(model, cache, [replace(span, first=span.first - 1) for span in spans])
    began_s = clock()
    _step(model, cache, spans)
    return clock() - began_s


def _fill(model: Llama, cache: KVCache, span: Span) -> None:
    """Stores made-up keys and values: what they are does not change the time of the steps that read them."""
    config = model.config
    shapes = [(span.count, heads, config.head_dim) for heads in (config.heads, config.kv_heads, config.kv_heads)]
    queries_THD, keys_TKD, values_TKD = (torch.zeros(shape, dtype=model.dtype, device=model.device) for shape in shapes)
    cache.begin([span])
    for layer in range(config.layers):
        cache.attend(layer, queries_THD, keys_TKD, values_TKD)
    cache.end()


def _step(model: Llama, cache: KVCache, spans: Sequence[Span]) -> None:
    positions = [position for span in spans for position in range(span.first, span.end)]
    wanted = [span.start + span.count - 1 for span in spans]
    device = model.device
    cache.begin(spans)
    ids_T = torch.tensor([2 + position % 100 for position in positions], device=device) % model.config.vocabulary
    logits_NV = model(ids_T, torch.tensor(positions, device=device), torch.tensor(wanted, device=device), cache)
    cache.end()
    logits_NV.cpu()
