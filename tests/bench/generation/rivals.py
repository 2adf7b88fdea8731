"""Ours beside transformers and llama.cpp on the same prompts, by processor seconds, one thread each, taking turns.

Ragged conversations: prompts and answers of different lengths, all there at the beginning. transformers pads them to
static batches, sorted by length, and generates until a batch's longest answer is complete. Its continuous batching,
ours and llama.cpp's end each answer by itself. Tokens that nobody asked for do not count.

    python -m tests.bench.generation.rivals --model smollm2 --gguf smollm2.gguf --out rivals.json

Run it with a Python that has transformers, and xllamacpp for --gguf. What is not installed is left out.
"""

import argparse
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import ModelExecutor, make_cache
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.policies.by_name import make_policy
from isthmus.cloud.generation.scheduling.engine import Engine
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Request, Sampling
from isthmus.cloud.generation.scheduling.step import Drawn
from tests.bench.harness import Report, interleaved, shown


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    tokens: int


def alike(rows: int, prompt: int = 32, tokens: int = 24) -> list[Asked]:
    rng = np.random.default_rng(rows)
    return [Asked(rng.integers(100, 10_000, prompt).tolist(), tokens) for _ in range(rows)]


def ragged(rows: int) -> list[Asked]:
    """Conversations: medians of 48 and 32 tokens, cut at 160 and 128."""
    rng = np.random.default_rng(7)
    lengths = np.exp(rng.normal(np.log([48, 32]), 0.9, (rows, 2))).clip(4, [160, 128]).astype(int)
    return [Asked(rng.integers(100, 10_000, int(prompt)).tolist(), int(tokens)) for prompt, tokens in lengths]


def ours(model: Any, work: Sequence[Asked]) -> None:
    limits = Limits(rows=max(1, min(32, len(work))), blocks=2_048)
    engine = Engine(reference_profile(), make_policy("fused"), limits, expires=False, adapts=False)
    executor = ModelExecutor(model, make_cache("slots", model, limits))
    for id, each in enumerate(work):
        engine.submit(Request(id, each.prompt, each.tokens, 0.0, sampling=Sampling(temperature=0.0)), 0.0)
    while engine.under_way:
        decision = engine.next_step(0.0)
        executor.drop(decision.drop)
        if decision.step is not None:
            drawn = executor.run(decision.step)
            engine.finished(decision.step, {id: Drawn(token) for id, token in drawn.items()}, 0.0)


def static(theirs: Any, work: Sequence[Asked], batch: int) -> None:
    """transformers' generate on batches of ``batch``, sorted by length of the answer, padded on the left."""
    ordered = sorted(work, key=lambda each: each.tokens)
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        longest = max(len(each.prompt) for each in part)
        ids = torch.tensor([[0] * (longest - len(each.prompt)) + each.prompt for each in part])
        mask = torch.tensor([[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in part])
        most = max(each.tokens for each in part)
        exactly = {"min_new_tokens": most, "max_new_tokens": most, "do_sample": False, "pad_token_id": 0}
        theirs.generate(input_ids=ids, attention_mask=mask, **exactly)


def continuous(theirs: Any, work: Sequence[Asked]) -> None:
    """transformers' continuous batching, with every request there at the beginning."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    # As much room as ours has: by default it takes most of the machine's memory, and most of its time.
    room = ContinuousBatchingConfig(page_size=16, num_blocks=1_024, max_batch_tokens=256)
    with theirs.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=room, warmup=False
    ) as manager:
        for each in work:
            manager.add_request(input_ids=each.prompt, max_new_tokens=each.tokens)
        left = len(work)
        while left:
            found = manager.get_result(timeout=60)
            if found is None:
                raise RuntimeError("transformers' continuous batching gave no result within a minute")
            left -= found.is_finished()


def llama_cpp(path: Path) -> Callable[[Sequence[Asked]], None]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.warmup = str(path), 0, False
    params.n_ctx, params.n_parallel = 16 * 320, 16
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def one(each: Asked) -> None:
        server.handle_completions(
            {
                "prompt": each.prompt,
                "n_predict": each.tokens,
                "ignore_eos": True,
                "temperature": 0,
                "cache_prompt": False,
            }
        )

    def run(work: Sequence[Asked]) -> None:
        threads = [threading.Thread(target=one, args=(each,)) for each in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def candidates(asked: argparse.Namespace) -> dict[str, Callable[[Sequence[Asked]], None]]:
    model = load_llama(asked.model, LlamaConfig.read(asked.model), number_type=asked.number_type)
    found: dict[str, Callable[[Sequence[Asked]], None]] = {"ours": lambda work: ours(model, work)}
    try:
        from transformers import AutoModelForCausalLM

        import isthmus.distill.torchvision_import  # noqa: F401  (transformers imports torchvision)
    except ImportError:
        pass
    else:
        theirs = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.number_type)).eval()
        for batch in (8, 16):
            found[f"transformers, static {batch}"] = lambda work, batch=batch: static(theirs, work, batch)
        paged = AutoModelForCausalLM.from_pretrained(
            asked.model, dtype=getattr(torch, asked.number_type), attn_implementation="paged|sdpa"
        ).eval()
        found["transformers, continuous"] = lambda work: continuous(paged, work)
    if asked.gguf is not None:
        found["llama.cpp, 16 slots"] = llama_cpp(asked.gguf)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--number-type", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", choices=("1", "8", "16", "ragged"), nargs="+", default=["1", "8", "16", "ragged"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = candidates(asked)
    report = Report(
        "rivals", {"model": asked.model.name, "number_type": asked.number_type}, ("torch", "transformers", "xllamacpp")
    )
    for name in asked.work:
        work = ragged(24) if name == "ragged" else alike(int(name))
        timed = interleaved({who: partial(run, work) for who, run in runs.items()}, repeats=asked.repeats, warmups=1)
        tokens = sum(each.tokens for each in work)
        report.rows += [
            {"work": name, "who": who, "tokens": tokens, "cpu_s": time.cpu_s.to_json(), "wall_s": time.wall_s.to_json()}
            for who, time in timed.items()
        ]
    columns: dict[str, Any] = {
        "work": lambda row: row["work"],
        "who": lambda row: row["who"],
        "CPU s": lambda row: shown(row["cpu_s"]),
        "tokens per CPU s": lambda row: f"{row['tokens'] / row['cpu_s']['median']:.1f}",
    }
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
