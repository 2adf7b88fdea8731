"""Whether the sentence about how the user feels moves the model towards the reply that fits.

Each of six states has a reply that fits it. Which reply gains most in log-likelihood by the sentence, compared
with the same conversation without it? Chance is one in six.

    python -m tests.bench.generation.emotion --model smollm2 --out emotion.json
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.executor import make_cache
from isthmus.cloud.generation.model.kv import Span
from isthmus.cloud.generation.model.llama import Llama
from isthmus.cloud.generation.model.tokenizer import TextTokenizer
from isthmus.cloud.generation.model.weights import load_llama
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.serve.emotion import TEMPLATE, Emotion, with_emotion
from tests.bench.harness import Report

SAID = ("I have had quite a day.", "My train was cancelled.", "Somebody left a parcel at my door.")
REPLIES = {
    "neutral": "All right. Here is what you can do next.",
    "happy": "That is wonderful! I am so glad for you.",
    "sad": "I am so sorry. It is all right to feel down, and I am here for you.",
    "fear": "You are safe. Take a slow breath, and let us go step by step.",
    "disgust": "That sounds really unpleasant. Let us get it cleaned up.",
    "anger": "You have every right to be upset, and I apologise. Let me fix this.",
}


def log_likelihood(model: Llama, tokens: list[int], begins: int) -> float:
    """Returns the log-likelihood of the tokens from ``begins`` on."""
    cache = make_cache("slots", model, Limits())
    cache.begin([Span(0, 0, 0, len(tokens))])
    wanted = torch.arange(begins - 1, len(tokens) - 1)
    logits_NV = model(torch.tensor(tokens), torch.arange(len(tokens)), wanted, cache)
    found = logits_NV.log_softmax(-1)[torch.arange(len(wanted)), torch.tensor(tokens[begins:])]
    return float(found.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig.read(asked.model)
    model, tokenizer = load_llama(asked.model, config), TextTokenizer.read(asked.model, config)
    report = Report("the user's state", {"model": asked.model.name, "template": TEMPLATE}, ("torch",))

    def of(said: str, reply: str, emotion: Emotion | None) -> float:
        prompt = tokenizer.chat(with_emotion([{"role": "user", "content": said}], emotion))
        return log_likelihood(model, prompt + tokenizer.encode(reply), len(prompt))

    right = 0
    for said in SAID:
        plain = {name: of(said, reply, None) for name, reply in REPLIES.items()}
        for state in REPLIES:
            gains = {name: of(said, reply, Emotion(state, 0.9)) - plain[name] for name, reply in REPLIES.items()}
            best = max(gains, key=gains.__getitem__)
            right += best == state
            report.rows.append({"said": said, "state": state, "gains most": best, "gains": gains})
    report.notes.append(f"{right} of {len(report.rows)} right; chance is {len(report.rows) / len(REPLIES):.0f}")
    columns: dict[str, Any] = {name: lambda row, name=name: row[name] for name in ("said", "state", "gains most")}
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
