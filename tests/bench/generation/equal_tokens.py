"""The share of next tokens that the model draws in bfloat16 as in float32, by layout of the KV cache.

The greedy answers of the model in float32 are given to the model in bfloat16 token by token, all requests side by side,
so that one other token does not change those after it. In float32, the layouts must agree on all of them.

    python -m tests.bench.generation.equal_tokens --model smollm2 --out equal.json
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import make_cache
from isthmus.cloud.generation.model.kv import LAYOUTS, Span
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.tokenizer import TextTokenizer
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.scheduling.policy import Limits
from tests.bench.harness import Report

ASKED = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I make tea?",
    "Name three animals that live in the forest, and say what each of them eats.",
    "Why is the sky blue?",
    "I feel sad today. Please tell me something kind.",
    "Translate into French: the train is late.",
    "What is 12 + 30?",
    "Explain what a computer does to a child of five years, in two sentences.",
    "List the days of the week.",
)
BLOCKS_EACH = 16


def logits(model: Llama, layout: str, prompts: list[list[int]], answers: list[list[int]] | None, tokens: int) -> Tensor:
    """Returns the logits of ``tokens`` next tokens per prompt, (steps, prompts, vocabulary).

    After each step the rows get the token of ``answers``; without it their own most likely one.
    """
    cache = make_cache(layout, model, Limits(rows=len(prompts), blocks=BLOCKS_EACH * len(prompts)))
    known, steps = [list(prompt) for prompt in prompts], []
    done = [0] * len(prompts)
    for at in range(tokens):
        spans, ids, positions, last = [], [], [], []
        for row, each in enumerate(known):
            blocks = tuple(range(BLOCKS_EACH * row, BLOCKS_EACH * (row + 1)))
            spans.append(Span(row, len(ids), done[row], len(each) - done[row], blocks))
            positions += range(done[row], len(each))
            ids += each[done[row] :]
            last.append(len(ids) - 1)
            done[row] = len(each)
        cache.begin(spans)
        steps.append(model(torch.tensor(ids), torch.tensor(positions), torch.tensor(last), cache))
        cache.end()
        drawn = steps[-1].argmax(dim=-1).tolist()
        for row, each in enumerate(known):
            each.append(drawn[row] if answers is None else answers[row][at])
    return torch.stack(steps)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig.read(asked.model)
    tokenizer = TextTokenizer.read(asked.model, config)
    prompts = [tokenizer.chat([{"role": "user", "content": each}]) for each in ASKED]
    exact = load_llama(asked.model, config, number_type="float32")
    reference = logits(exact, "slots", prompts, None, asked.tokens)
    answers: list[list[int]] = reference.argmax(dim=-1).T.tolist()
    first, second = reference.topk(2, dim=-1).values.unbind(dim=-1)
    report = Report("equal tokens", {"model": asked.model.name, "tokens": asked.tokens}, ("torch",))
    models = {"float32": exact, "bfloat16": load_llama(asked.model, config, number_type="bfloat16")}
    for number_type, model in models.items():
        for layout in LAYOUTS:
            found = logits(model, layout, prompts, answers, asked.tokens)
            equal = found.argmax(dim=-1) == reference.argmax(dim=-1)
            lost = (first - second)[~equal]
            report.rows.append(
                {
                    "number_type": number_type,
                    "layout": layout,
                    "equal": float(equal.float().mean()),
                    "mean_difference": float((found - reference).abs().mean()),
                    "largest_lead_lost": float(lost.max()) if len(lost) else 0.0,
                }
            )
    columns: dict[str, Any] = {
        "number type": lambda row: row["number_type"],
        "layout": lambda row: row["layout"],
        "equal tokens": lambda row: f"{row['equal']:.3f}",
        "mean difference of logits": lambda row: f"{row['mean_difference']:.4f}",
        "largest lead that was lost": lambda row: f"{row['largest_lead_lost']:.3f}",
    }
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
