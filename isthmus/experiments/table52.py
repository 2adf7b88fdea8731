"""Accuracy of every client by every method over seeds: the latency-sensitive half of the paper's Table 5.2.

Resumable cell by cell: a finished cell is a JSON file, and is not run again.
"""

import json
import platform
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.data.clip import Listing
from isthmus.data.splits import Split, latency_halves
from isthmus.distill.base import make_student
from isthmus.distill.checkpoint import write_atomically
from isthmus.distill.evaluate import accuracy, bank_probabilities, student_outputs
from isthmus.distill.prepare import decode
from isthmus.distill.release import Release
from isthmus.distill.teach import teacher_accuracy
from isthmus.distill.train import EpochReport
from isthmus.experiments.offline import METHODS, personalise
from isthmus.experiments.wire import bytes_per_clip

Told = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One student measured. Accuracies are shares of ``test_clips``."""

    client: str
    method: str
    seed: int
    selection_clips: int
    test_clips: int
    by_ratio: dict[str, float]
    """The student's own head at each compression ratio; "1" is the table's figure."""
    teacher_head: float
    """The teacher head on the student's features, untrained for them."""
    teacher: float
    """The teacher itself on the same clips: what a perfect student of it would reach."""
    selected_per_class: tuple[int, ...]
    smallest_cluster: int
    stage_s: dict[str, float]
    losses: tuple[float, ...]


def run(
    release: Release,
    listing: Listing,
    split: Split,
    *,
    seeds: Sequence[int],
    methods: Sequence[str] = METHODS,
    out: Path,
    device: torch.device,
    told: Told,
    watch: Callable[[str, EpochReport], None],
) -> dict[str, Any]:
    """Runs what is missing and returns the whole result, which it also writes to ``out/result.json``."""
    clips = {
        client: decode(listing, names, release.recipe, release.root / "private")
        for client, names in split.clients.items()
    }
    taught = {client: asdict(teacher_accuracy(release.teacher, clips[client], device)) for client in clips}
    everyone = decode(listing, split.private, release.recipe, release.root / "private")
    taught["both clients"] = asdict(teacher_accuracy(release.teacher, everyone, device))
    cells: list[Cell] = []
    for seed in seeds:
        make_student(release, seed, device, lambda report: watch("AllDistill", report))
        start = release.student(seed)
        for client, own in clips.items():
            chosen, tested = latency_halves(own.names, [int(label) for label in own.labels_N], seed)
            selection_clips, test_clips = own.subset(own.indices(chosen)), own.subset(own.indices(tested))
            labels_N = np.asarray(test_clips.labels_N)
            for method in methods:
                path = out / "cells" / f"{client}-{method}-{seed}.json"
                if not path.exists():
                    work_dir = out / "work" / path.stem
                    made = personalise(
                        release,
                        selection_clips,
                        method,
                        seed=seed,
                        start=start,
                        work_dir=work_dir,
                        device=device,
                    )
                    outputs = student_outputs(made.student, release.teacher_head, test_clips, device)
                    cell = Cell(
                        client=client,
                        method=method,
                        seed=seed,
                        selection_clips=len(chosen),
                        test_clips=len(tested),
                        by_ratio={
                            f"{ratio:g}": accuracy(bank_probabilities(made.heads, outputs, ratio), labels_N)
                            for ratio in made.heads.ratios
                        },
                        teacher_head=accuracy(outputs.probabilities_NC, labels_N),
                        teacher=teacher_accuracy(release.teacher, test_clips, device).joint,
                        selected_per_class=made.selected_per_class,
                        smallest_cluster=made.smallest_cluster,
                        stage_s=made.stage_s,
                        losses=made.losses,
                    )
                    write_atomically(path, json.dumps(asdict(cell), indent=1).encode())
                    shutil.rmtree(work_dir, ignore_errors=True)
                cells.append(read_cell(path))
                told(
                    f"seed {seed}, client {client}, {method}: {100 * cells[-1].by_ratio['1']:.1f} % of "
                    f"{cells[-1].test_clips} clips, {sum(cells[-1].stage_s.values()):.0f} s"
                )
    result = {
        "what": "latency-sensitive accuracy by client and method",
        "recipe": json.loads(release.recipe.to_json()),
        "release": release.outputs_key(),
        "split": split.name,
        "seeds": list(seeds),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} torch threads, device {device.type}",
        "teacher": taught,
        "cells": [asdict(cell) for cell in cells],
        "bytes_per_clip": bytes_per_clip(release.recipe.feature_width, release.recipe.ratios),
    }
    write_atomically(out / "result.json", json.dumps(result, indent=1).encode())
    write_atomically(out / "result.md", markdown(result).encode())
    return result


def read_cell(path: Path) -> Cell:
    raw = json.loads(path.read_text())
    return Cell(**{**raw, "selected_per_class": tuple(raw["selected_per_class"]), "losses": tuple(raw["losses"])})


def markdown(result: dict[str, Any]) -> str:
    """The result as tables a person reads: mean and standard deviation over seeds, in percent."""
    cells = result["cells"]
    clients = list(dict.fromkeys(cell["client"] for cell in cells))
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    ratios = list(cells[0]["by_ratio"])

    def over_seeds(client: str, method: str, value: Callable[[dict[str, Any]], float], scale: float = 100.0) -> str:
        values = [scale * value(cell) for cell in cells if cell["client"] == client and cell["method"] == method]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.1f} ± {spread:.1f}"

    lines = [
        "### Teacher, accuracy % on private clips",
        "",
        "| clips of | joint | sound alone | picture alone | clips |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for client, row in result["teacher"].items():
        shares = " | ".join(f"{100 * row[key]:.1f}" for key in ("joint", "audio", "visual"))
        lines.append(f"| {client} | {shares} | {row['clips']} |")
    lines += ["", "### Student, accuracy % at ratio 1, mean ± standard deviation over seeds", ""]
    lines += [f"| method | {' | '.join(clients)} |", f"| --- |{' --- |' * len(clients)}"]
    for method in methods:
        row = " | ".join(over_seeds(client, method, lambda cell: cell["by_ratio"]["1"]) for client in clients)
        lines.append(f"| {method} | {row} |")
    row = " | ".join(over_seeds(client, methods[0], lambda cell: cell["teacher"]) for client in clients)
    lines.append(f"| (the teacher on the same clips) | {row} |")
    lines += ["", "### By the teacher head instead of the student's own", ""]
    lines += [f"| method | {' | '.join(clients)} |", f"| --- |{' --- |' * len(clients)}"]
    for method in methods:
        row = " | ".join(over_seeds(client, method, lambda cell: cell["teacher_head"]) for client in clients)
        lines.append(f"| {method} | {row} |")
    lines += ["", "### By compression ratio, method cluster", ""]
    lines += [f"| ratio | {' | '.join(clients)} |", f"| --- |{' --- |' * len(clients)}"]
    shown = "cluster" if "cluster" in methods else methods[-1]
    for ratio in ratios:
        at_ratio = partial(_at_ratio, ratio)
        row = " | ".join(over_seeds(client, shown, at_ratio) for client in clients)
        lines.append(f"| {ratio} | {row} |")
    lines += ["", "### Bytes up per clip (message and gRPC prefix)", ""]
    lines += [f"| number type | {' | '.join(f'ratio {r}' for r in ratios)} |", f"| --- |{' --- |' * len(ratios)}"]
    for number_type, by_ratio in result["bytes_per_clip"].items():
        lines.append(f"| {number_type} | {' | '.join(str(by_ratio[ratio]) for ratio in ratios)} |")
    lines += ["", "### Seconds of one personalisation by stage, mean ± standard deviation", ""]
    stages = list(cells[0]["stage_s"])
    lines += [f"| method | {' | '.join(stages)} |", f"| --- |{' --- |' * len(stages)}"]
    for method in methods:
        seconds = []
        for stage in stages:
            values = [cell["stage_s"][stage] for cell in cells if cell["method"] == method]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            seconds.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
        lines.append(f"| {method} | {' | '.join(seconds)} |")
    floors = [cell["smallest_cluster"] for cell in cells if cell["method"] == "cluster"]
    if floors:
        lines += ["", f"Smallest cluster behind any prototype sent: {min(floors)} clips."]
    return "\n".join(lines) + "\n"


def _at_ratio(ratio: str, cell: dict[str, Any]) -> float:
    return float(cell["by_ratio"][ratio])
