"""False hits of the semantic cache: pairs of questions that mean the same, and pairs that do not, by threshold.

The pairs are made of templates, so their labels are sure: two wordings with the same contents mean the same; with one
content changed (a number, a thing, an opposite, a negation) they do not. Real users word things in more ways.

    python -m tests.bench.generation.false_hits --embedder minilm --out false-hits.json
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.cloud.generation.model.embedder import Embedder
from isthmus.cloud.generation.scheduling.cache import alike
from tests.bench.harness import Report

THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98)
GOOD = 0.01
TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "support": (
        (
            "How do I {0} my {1}?",
            "I want to {0} my {1}. What do I have to do?",
            "What are the steps to {0} my {1}?",
            "Could you tell me how to {0} my {1}, please?",
        ),
        (
            ("reset", "change", "cancel", "enable", "disable"),
            ("password", "subscription", "account", "phone number", "address"),
        ),
    ),
    "code": (
        (
            "Write a {0} function that sorts a list of {1} in {2} order.",
            "Show me how to sort a list of {1} in {2} order in {0}.",
            "In {0}, how can I sort {1} so that they are in {2} order?",
        ),
        (("Python", "Java", "Rust"), ("numbers", "names", "dates"), ("ascending", "descending")),
    ),
    "facts": (
        (
            "What is the {0} of {1}?",
            "Tell me the {0} of {1}.",
            "I would like to know the {0} of {1}.",
            "Do you know what the {0} of {1} is?",
        ),
        (("capital", "population", "currency", "highest mountain"), ("France", "Japan", "Brazil", "Kenya", "Canada")),
    ),
    "amounts": (
        (
            "Convert {0} {1} to {2}.",
            "How many {2} are {0} {1}?",
            "What is {0} {1} in {2}?",
        ),
        (("5", "15", "50", "1.5"), ("miles", "pounds", "litres"), ("kilometres", "kilograms", "gallons")),
    ),
    "advice": (
        (
            "Is it {0} to {1} {2} bed?",
            "I wonder if it is {0} to {1} {2} going to bed.",
            "Would you say that to {1} {2} bed is {0}?",
        ),
        (
            ("healthy", "unhealthy", "safe", "not safe"),
            ("drink coffee", "exercise", "read", "eat"),
            ("before", "after"),
        ),
    ),
}
"""Per class: wordings, and what may stand in each place."""


@dataclass(frozen=True)
class Pair:
    kind: str
    first: str
    second: str
    same: bool


def pairs(seed: int = 0, most: int = 400) -> list[Pair]:
    """Returns the pairs of all classes, up to ``most`` of each label in each class."""
    rng = random.Random(seed)
    found = []
    for kind, (wordings, places) in TEMPLATES.items():
        contents = list(itertools.product(*places))
        alike_ones = [
            Pair(kind, first.format(*each), second.format(*each), True)
            for each in contents
            for first, second in itertools.combinations(wordings, 2)
        ]
        others = [
            Pair(kind, first.format(*one), second.format(*other), False)
            for one, other in itertools.combinations(contents, 2)
            if sum(a != b for a, b in zip(one, other, strict=True)) == 1
            for first, second in _wordings(wordings)
        ]
        for made in (alike_ones, others):
            rng.shuffle(made)
            found += made[:most]
    return found


def _wordings(wordings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    yield wordings[0], wordings[0]
    yield wordings[0], wordings[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embedder", type=Path, required=True)
    parser.add_argument("--most", type=int, default=400)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    embedder = Embedder.read(asked.embedder)
    made = pairs(most=asked.most)
    texts = sorted({text for pair in made for text in (pair.first, pair.second)})
    began_s = time.process_time()
    vectors = {text: embedder.embed(text) for text in texts}
    each_s = (time.process_time() - began_s) / len(texts)
    cosines = np.array([float(vectors[pair.first] @ vectors[pair.second]) for pair in made])
    passed = np.array([alike(pair.first, pair.second) for pair in made])
    same = np.array([pair.same for pair in made])
    report = Report("false hits", {"embedder": asked.embedder.name, "pairs": len(made)}, ("torch",))
    report.floors["CPU ms per sentence"] = 1e3 * each_s
    for kind in (*TEMPLATES, "all"):
        of = np.array([kind in (pair.kind, "all") for pair in made])
        for threshold in THRESHOLDS:
            near = of & (cosines >= threshold)
            row: dict[str, Any] = {"class": kind, "threshold": threshold}
            for name, hits in (("without guard", near), ("with guard", near & passed)):
                # A false hit counts against all hits, as a user meets them.
                row[name] = {
                    "false": float((hits & ~same).sum() / max(1, hits.sum())),
                    "found": float((hits & same).sum() / max(1, (of & same).sum())),
                    "hits": int(hits.sum()),
                }
            report.rows.append(row)
        kept = [row for row in report.rows if row["class"] == kind and row["with guard"]["false"] <= GOOD]
        least = min((row["threshold"] for row in kept), default=None)
        report.notes.append(f"{kind}: under 1 % false hits from threshold {least if least is not None else 'none'} on")
    columns: dict[str, Any] = {
        "class": lambda row: row["class"],
        "threshold": lambda row: f"{row['threshold']:.2f}",
        "false, no guard": lambda row: f"{row['without guard']['false']:.1%}",
        "false, guard": lambda row: f"{row['with guard']['false']:.1%}",
        "found, guard": lambda row: f"{row['with guard']['found']:.0%}",
    }
    report.finish(columns, asked.out)


if __name__ == "__main__":
    main()
