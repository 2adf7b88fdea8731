"""Experts against dense models of equal operations: accuracy, conflict of gradients, balance and memory.

Four tasks on CIFAR-10's pictures: its classes, animals against vehicles, the six animals, and readings of small
generated details. The first three share labels, so they disturb each other little; the details oppose them. Every
variant sees the same pictures of each task, begins with the same heads, and takes as many operations per picture. A
cell is one variant of one seed.

Axes: T tasks, M layers with experts, E experts.
"""

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from isthmus.cloud.elastic.experts.layer import Seen
from isthmus.cloud.elastic.experts.shelf import Shelf
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.prepare import joint
from isthmus.cloud.elastic.prepare.inputs import opened, pictures_of
from isthmus.cloud.elastic.prepare.profiler import accuracy
from isthmus.cloud.elastic.prepare.upcycling import save, with_experts
from isthmus.cloud.elastic.scheduling.levels import level_of
from isthmus.cloud.elastic.tasks.recipes import RECIPES
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.data.made_by import made_by
from isthmus.data.synthetic.details import detail_classes, with_details
from isthmus.experiments.elastic.kept import read_cell
from isthmus.experiments.elastic.spread import in_points

Report = Callable[[str], None]

DENSE_EACH: Final = "a dense model per task"
DENSE: Final = "one dense model"
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "experts, a router per task": {},
    "experts, a shared router": {"router": "shared"},
    "experts, windows": {"window": 4},
}
"""Changes of ``JointConfig`` for each variant with experts."""
EVERY: Final = (DENSE_EACH, DENSE, *VARIANTS)
CONFLICT_PICTURES: Final = 32
USED_SHARE: Final = 0.01
"""An expert counts as used by a task from this share of the task's tokens on."""


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, and for how long. ``pictures`` are per task and epoch."""

    model: str
    data: Path
    test: Path
    statistics: str | None = None
    learned: int = 2_000
    tested: int = 1_000
    pictures: int = 512
    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 2e-4
    marks: int = 2

    def config(self, seed: int, **changes: Any) -> joint.JointConfig:
        """Return how to train. Pictures are not mirrored, because a detail's reading goes from left to right."""
        train = dataclasses.replace(
            joint.JOINT,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            augment=False,
        )
        return dataclasses.replace(joint.JointConfig(train=train, seed=seed), **changes)


def tasks_on(labelled: LabelledImages, seed: int, marks: int) -> list[joint.JointTask]:
    """Return the four tasks on these pictures."""
    found = [joint.JointTask(one.name, len(one.classes), one.apply(labelled)) for one in RECIPES.values()]
    details = with_details(labelled, seed=seed, marks=marks)
    return [*found, joint.JointTask("details", len(detail_classes(marks)), details)]


def run(setup: Setup, *, seeds: Sequence[int], out: Path, report: Report) -> dict[str, Any]:
    """Run the missing cells, write ``out/result.json`` and ``.md``, and return the result.

    Raises ValueError if ``out`` has cells of another setup, and what reading models and pictures raises.
    """
    dense, pixels = opened(setup.model, setup.statistics)
    named = {"model": Path(setup.model).name, "data": setup.data.name, "test": setup.test.name}
    plain = {**vars(setup), **named}
    made = made_by(out, report)
    cells: list[dict[str, Any]] = []
    for seed in seeds:
        paths = {name: _path(out, seed, name) for name in EVERY}
        done = {name: read_cell(path, plain) for name, path in paths.items() if path.is_file()}
        missing = [name for name in EVERY if name not in done]
        if missing:
            # A seed draws other pictures to learn from and to be tested on.
            learning = tasks_on(pictures_of(setup.data, pixels, setup.learned, seed), seed, setup.marks)
            tested = tasks_on(pictures_of(setup.test, pixels, setup.tested, seed), seed + 1_000, setup.marks)
            heads = joint.first_heads(dense, pixels, learning, device=torch.device("cpu"), seed=seed)
            for name in missing:
                began_s = time.process_time()
                cell = _cell(name, setup, dense, pixels, learning, tested, heads, seed, out)
                cell |= {"seed": seed, "variant": name, "processor_s": round(time.process_time() - began_s, 1)}
                write_atomically(paths[name], json.dumps({**cell, "setup": plain}, indent=1))
                done[name] = read_cell(paths[name], plain)
                shown = ", ".join(f"{task} {shares['0']:.1%}" for task, shares in cell["accuracy"].items())
                report(f"seed {seed}, {name}: {shown}")
        cells += [done[name] for name in EVERY]
    operations = {DENSE: dense.operations(0), "experts": with_experts(dense).operations(0)}
    result = {"what": "experts against dense models", "setup": plain, "seeds": list(seeds), "operations": operations}
    result |= {"code": made, "torch": torch.__version__, "cells": cells}
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    write_atomically(out / "result.md", markdown(result))
    return result


def _path(out: Path, seed: int, variant: str) -> Path:
    return out / "cells" / f"{seed}-{variant.replace(', ', '-').replace(' ', '-')}.json"


def _cell(
    name: str,
    setup: Setup,
    dense: ElasticViT,
    pixels: PixelSpec,
    learning: Sequence[joint.JointTask],
    tested: Sequence[joint.JointTask],
    heads: Sequence[nn.Linear],
    seed: int,
    out: Path,
) -> dict[str, Any]:
    units = dense.blocks[0].mlp.fc1.out_features

    def learned(model: ElasticViT, places: Sequence[int], **changes: Any) -> tuple[dict[str, TaskWeights], joint.Joint]:
        _, weights, made = joint.learn_together(
            model,
            pixels,
            [learning[place] for place in places],
            setup.config(seed, **changes),
            heads=[copy.deepcopy(heads[place]) for place in places],
            units=units,
            pictures=setup.pictures,
            device=torch.device("cpu"),
        )
        return weights, made

    every = range(len(learning))
    if name == DENSE_EACH:
        shares: dict[str, Any] = {}
        for place in every:
            own = copy.deepcopy(dense)
            weights, _ = learned(own, [place])
            shares |= _accuracies(own, pixels, weights, [tested[place]])
        return {"accuracy": shares}
    if name == DENSE:
        shared = copy.deepcopy(dense)
        weights, made = learned(shared, every)
        return {"accuracy": _accuracies(shared, pixels, weights, tested), "conflict": conflict(made, learning, pixels)}
    model = with_experts(dense)
    weights, made = learned(model, every, **VARIANTS[name])
    found = {"accuracy": _accuracies(model, pixels, weights, tested), "conflict": conflict(made, learning, pixels)}
    found |= {"use": use(made, tested, pixels)}
    folder = out / "models" / f"{seed}-{list(VARIANTS).index(name)}"
    save(model, folder, source=setup.model, pixels=pixels, units=units)
    return found | {"memory": memory(folder, pixels, weights, dense)}


def _accuracies(
    model: ElasticViT, pixels: PixelSpec, weights: Mapping[str, TaskWeights], tested: Sequence[joint.JointTask]
) -> dict[str, dict[str, float]]:
    """Return the accuracy of each task by level, at gamma 0."""
    runner = ElasticRunner(model, pixels)
    able = [level_of(0, fewer) for fewer in range(max(1, model.experts.k))]
    served = {task.name: runner.prepare(weights[task.name]) for task in tested}
    return {
        task.name: {str(level): accuracy(runner, served[task.name], task.labelled, level) for level in able}
        for task in tested
    }


def conflict(made: joint.Joint, learning: Sequence[joint.JointTask], pixels: PixelSpec) -> dict[str, float]:
    """Return the mean cosine between gradients of two tasks' losses, after training.

    "mlp": on the MLPs of every second block, or the experts in their place. "rest": on all other weights that all tasks
    share. Below 0, one task's step undoes the other's.
    """
    model = made.model
    every_second = {f"blocks.{block}.mlp." for block in range(1, model.depth, 2)}
    parts: dict[str, list[torch.Tensor]] = {"mlp": [], "rest": []}
    for name, parameter in model.vit.named_parameters():
        if not name.startswith(joint.FROZEN):
            parts["mlp" if name.startswith(tuple(every_second)) else "rest"].append(parameter.requires_grad_(True))
    gradients: list[dict[str, torch.Tensor]] = []
    for place, task in enumerate(learning):
        some = task.labelled.spread(CONFLICT_PICTURES)
        images_BCHW = torch.from_numpy(pixels.standardise(some.pictures_NHWC))
        tasks_B = torch.full((len(some),), place)
        features_BD, _ = made(images_BCHW, tasks_B)
        error = made.errors(features_BD, torch.from_numpy(some.labels_N), tasks_B).mean()
        flat = torch.autograd.grad(error, [*parts["mlp"], *parts["rest"]], allow_unused=True, materialize_grads=True)
        split = len(parts["mlp"])
        gradients.append(
            {
                "mlp": torch.cat([each.flatten() for each in flat[:split]]),
                "rest": torch.cat([each.flatten() for each in flat[split:]]),
            }
        )
    model.requires_grad_(False)
    return {
        part: statistics.fmean(
            float(nn.functional.cosine_similarity(one[part], other[part], dim=0))
            for one, other in combinations(gradients, 2)
        )
        for part in parts
    }


@torch.no_grad()
def use(made: joint.Joint, tested: Sequence[joint.JointTask], pixels: PixelSpec) -> dict[str, Any]:
    """Return how evenly experts are used, how many no token uses, and how far the tasks' experts overlap.

    ``variation`` is the coefficient of variation of the tokens per expert, averaged over layers. ``overlap`` is, for
    each pair of tasks, the sum over experts of the smaller of both shares of tokens: 1 if they use the same experts.
    """
    shape = made.model.experts
    counts_TME = np.zeros((len(tested), shape.layers, shape.experts))
    for place, task in enumerate(tested):
        some = task.labelled.spread(200)
        for first in range(0, len(some), 50):
            images_BCHW = torch.from_numpy(pixels.standardise(some.pictures_NHWC[first : first + 50]))
            seen: list[Seen] = made(images_BCHW, torch.full((len(images_BCHW),), place))[1]
            for each in seen:
                used_NK = each.experts_NK[each.weights_NK > 0]
                counts_TME[place, each.layer] += np.bincount(used_NK.flatten().numpy(), minlength=shape.experts)
    sums_ME = counts_TME.sum(axis=0)
    shares_TME = counts_TME / counts_TME.sum(axis=2, keepdims=True)
    overlap = {
        f"{tested[one].name}, {tested[other].name}": float(
            np.minimum(shares_TME[one], shares_TME[other]).sum(axis=1).mean()
        )
        for one, other in combinations(range(len(tested)), 2)
    }
    return {
        "variation": float((sums_ME.std(axis=1) / sums_ME.mean(axis=1)).mean()),
        "dead": int((sums_ME == 0).sum()),
        "of": int(sums_ME.size),
        "used_per_layer": {
            task.name: float((shares_TME[place] >= USED_SHARE).sum(axis=1).mean()) for place, task in enumerate(tested)
        },
        "overlap": overlap,
    }


def memory(folder: Path, pixels: PixelSpec, weights: Mapping[str, TaskWeights], dense: ElasticViT) -> dict[str, Any]:
    """Return bytes in memory with 1, 2 and all tasks registered, and bytes read when another task is asked.

    The heads and routers of tasks count. The switch is counted with room for the experts of one task alone.
    """
    of_dense = 4 * sum(parameter.numel() for parameter in dense.vit.parameters())
    found: dict[str, Any] = {"dense_bytes": of_dense, "tasks": {}}
    for count in sorted({1, 2, len(weights)}):
        elastic = ElasticViT(load_vit(folder, on_shelf=True))
        runner, shelf = ElasticRunner(elastic, pixels), _shelf(elastic)
        served = [runner.prepare(each) for each in list(weights.values())[:count]]
        shelf.wait()
        own = sum(value.nbytes for each in list(weights.values())[:count] for value in each.tensors().values())
        backbone = 4 * sum(parameter.numel() for parameter in elastic.vit.parameters())
        found["tasks"][str(len(served))] = {"bytes": backbone + shelf.bytes + own, "dense_each_bytes": count * of_dense}
    first, second = list(weights.values())[:2]
    wide = first.router.count if first.router is not None else 0
    limit = max(2, elastic.experts.layers * wide) * _shelf(elastic).expert_bytes
    elastic = ElasticViT(load_vit(folder, on_shelf=True, expert_bytes=limit))
    runner, shelf = ElasticRunner(elastic, pixels), _shelf(elastic)
    one, other = runner.prepare(first), runner.prepare(second)
    picture = np.zeros((1, elastic.image_px, elastic.image_px, 3), np.uint8)
    runner.answer(picture, 0, [one])
    shelf.wait()
    reads = shelf.loads
    runner.answer(picture, 0, [other])
    found["switch_bytes"] = (shelf.loads - reads) * shelf.expert_bytes
    return found


def _shelf(model: ElasticViT) -> Shelf:
    shelf = model.expert_layers[0].experts
    assert isinstance(shelf, Shelf)
    return shelf


def _over(cells: Sequence[Mapping[str, Any]], variant: str, value: Callable[[Mapping[str, Any]], float]) -> list[float]:
    """Return a value of each seed, in order of the seeds."""
    return [value(cell) for cell in sorted(cells, key=lambda cell: cell["seed"]) if cell["variant"] == variant]


def _mean(cell: Mapping[str, Any], level: str = "0") -> float:
    return statistics.fmean(shares.get(level, shares["0"]) for shares in cell["accuracy"].values())


def _share(task: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda cell: float(cell["accuracy"][task]["0"])


def _mean_at(level: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda cell: _mean(cell, level)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result."""
    cells = result["cells"]
    names = list(cells[0]["accuracy"])
    lines = ["| accuracy, % | " + " | ".join(names) + " | mean | less one dense model, points |"]
    lines.append("| --- |" + " --- |" * (len(names) + 2))
    shared = _over(cells, DENSE, _mean)
    for variant in EVERY:
        of = [_over(cells, variant, _share(name)) for name in names]
        means = _over(cells, variant, _mean)
        less = "" if variant == DENSE else in_points([one - other for one, other in zip(means, shared, strict=True)])
        shown = " | ".join(f"{100 * statistics.fmean(each):.2f}" for each in of)
        lines.append(f"| {variant} | {shown} | {100 * statistics.fmean(means):.2f} | {less} |")
    lines += ["", "Each task less its own dense model, points (mean ± standard error over seeds, paired):", ""]
    lines += ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for variant in EVERY[1:]:
        each = []
        for name in names:
            mine, own = (_over(cells, one, _share(name)) for one in (variant, DENSE_EACH))
            each.append(in_points([here - there for here, there in zip(mine, own, strict=True)]))
        lines.append(f"| {variant} | " + " | ".join(each) + " |")
    levels = sorted({int(level) for cell in cells for shares in cell["accuracy"].values() for level in shares})
    lines += ["", "Mean accuracy by experts per token, %:", ""]
    lines.append("| | " + " | ".join(str(len(levels) - place) for place in range(len(levels))) + " |")
    lines.append("| --- |" + " --- |" * len(levels))
    for variant in VARIANTS:
        at = [statistics.fmean(_over(cells, variant, _mean_at(str(level)))) for level in reversed(levels)]
        lines.append(f"| {variant} | " + " | ".join(f"{100 * share:.2f}" for share in at) + " |")
    heads = ("cosine, MLPs", "cosine, other weights", "variation of load", "unused experts", "overlap of two tasks")
    lines += ["", "| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for variant in EVERY[1:]:
        of_variant = [cell for cell in cells if cell["variant"] == variant]
        cosines = [statistics.fmean(cell["conflict"][part] for cell in of_variant) for part in ("mlp", "rest")]
        row = f"| {variant} | {cosines[0]:+.3f} | {cosines[1]:+.3f} |"
        if variant in VARIANTS:
            used = [cell["use"] for cell in of_variant]
            overlap = statistics.fmean(share for one in used for share in one["overlap"].values())
            dead = statistics.fmean(one["dead"] for one in used)
            row += f" {statistics.fmean(one['variation'] for one in used):.2f} | {dead:.1f} of {used[0]['of']} |"
            lines.append(f"{row} {overlap:.2f} |")
        else:
            lines.append(f"{row} | | |")
    counts = list(cells[-1]["memory"]["tasks"])
    lines += ["", "| MB with so many tasks | " + " | ".join(counts) + " | read at a switch |"]
    lines.append("| --- |" + " --- |" * (len(counts) + 1))
    one = {cell["variant"]: cell["memory"] for cell in cells if "memory" in cell}
    dense = " | ".join(f"{of['dense_each_bytes'] / 1e6:.1f}" for of in cells[-1]["memory"]["tasks"].values())
    lines.append(f"| {DENSE_EACH} | {dense} | {cells[-1]['memory']['dense_bytes'] / 1e6:.1f} |")
    for variant, of in one.items():
        shown = " | ".join(f"{bytes_['bytes'] / 1e6:.1f}" for bytes_ in of["tasks"].values())
        lines.append(f"| {variant} | {shown} | {of['switch_bytes'] / 1e6:.1f} |")
    return "\n".join(lines) + "\n"
