"""Merging schedules compared: accuracy and throughput (table 3.2 of OTAS), and similarity of tokens (figure 3.8).

For each gamma, every candidate schedule (model/schedules.py: the same in every layer, the paper's three, two of ours)
is measured on two sets of pictures. One chooses the best schedule, the other judges it. A seed draws both sets anew.

Axes: L layers, N tokens.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from isthmus.cloud.elastic.model.runner import ElasticRunner, ServedTask
from isthmus.cloud.elastic.model.schedules import Schedule, candidates
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare.inputs import fitting, opened, pictures_of
from isthmus.cloud.elastic.prepare.profiler import accuracy
from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder
from isthmus.cloud.elastic.tasks.files import load_tasks
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe, read_recipe
from isthmus.cloud.elastic.tasks.task import TaskWeights
from isthmus.data.files import read_text, write_atomically
from isthmus.data.images import LabelledImages, PixelSpec
from isthmus.data.made_by import made_by
from isthmus.distill.figures import png
from isthmus.experiments.elastic.kept import merge_order_in, read_cell
from isthmus.experiments.elastic.spread import in_points

Report = Callable[[str], None]
SIMILAR_PICTURES: Final = 64
PERCENTS: Final = tuple(range(0, 101, 2))


@dataclass(frozen=True)
class Setup:
    """What is compared. ``tasks`` is a folder with one task; without it the model's own head answers ``task``.

    ``repeats`` batches of ``size`` pictures are timed for each schedule; 0: no times.
    """

    model: str
    data: Path
    statistics: str | None = None
    task: str = "cifar10"
    tasks: Path | None = None
    gammas: tuple[int, ...] = (-24, -16)
    choosing: int = 1_000
    tested: int = 1_500
    size: int = 32
    repeats: int = 0


def run(
    setup: Setup, *, seeds: Sequence[int], out: Path, report: Report, merge_order: MergeOrder | None = None
) -> dict[str, Any]:
    """Measures what is missing, writes ``out/result.json``, ``.md`` and a picture, and returns the result.

    ``merge_order``: None for that of a run that is continued, or the default. Raises ValueError for gammas that the
    model cannot run, a task that does not fit, too few pictures, and a folder with cells of another setup or order.
    """
    if not setup.gammas or max(setup.gammas) >= 0:
        raise ValueError(f"gammas {setup.gammas}: schedules are for gammas below 0")
    worked = made_by(out, report)
    order = merge_order_in(out, merge_order)
    elastic, pixels = opened(setup.model, setup.statistics, merge_order=order)
    fitting(setup.gammas, elastic)
    recipe, weights = _task(setup, elastic)
    pictures = recipe.apply(pictures_of(setup.data, pixels, None, 0))
    if len(pictures) < setup.choosing + setup.tested:
        raise ValueError(
            f"{setup.data.name} has {len(pictures)} pictures of task {recipe.name!r}: --choosing and --tested ask for "
            f"{setup.choosing + setup.tested}"
        )
    of_gamma = {gamma: candidates(gamma, elastic.depth, elastic.tokens) for gamma in setup.gammas}
    made = {
        (gamma, schedule): ElasticViT(elastic.vit, {gamma: schedule}, merge_order=elastic.merge_order)
        for gamma, found in of_gamma.items()
        for schedule in found
    }
    named = {"model": Path(setup.model).name, "data": setup.data.name, "size": None, "repeats": None}
    named |= {"tasks": None if setup.tasks is None else setup.tasks.name, "task": recipe.name}
    plain: dict[str, Any] = json.loads(json.dumps({**vars(setup), **named}))
    cells = []
    for seed in seeds:
        path = out / "cells" / f"{recipe.name}-{seed}.json"
        if not path.is_file():
            cell = {"seed": seed, **_cell(setup, elastic, pixels, made, weights, pictures, seed)}
            write_atomically(path, json.dumps({**cell, "setup": plain}, indent=1))
        cells.append(read_cell(path, plain))
        report(f"seed {seed}: {recipe.name}, {cells[-1]['whole']:.1%} with all tokens")
    times = out / f"times-{recipe.name}.json"
    if setup.repeats:
        rates = images_per_s(made, elastic, pixels, weights, size=setup.size, repeats=setup.repeats)
        kept = {_key(gamma, schedule): rate for (gamma, schedule), rate in rates.items()}
        write_atomically(times, json.dumps({"size": setup.size, "repeats": setup.repeats, "images_per_s": kept}))
    result: dict[str, Any] = {
        "what": "merging schedules",
        "setup": plain,
        "task": recipe.name,
        "seeds": list(seeds),
        "tokens": elastic.tokens,
        "merge_order": order,
        "operations": {_key(*key): model.operations(key[0]) for key, model in made.items()},
        "times": json.loads(read_text(times)) if times.is_file() else None,
        "similarity": similarity(ElasticRunner(elastic, pixels), pictures.spread(SIMILAR_PICTURES)),
        "code": worked,
        "torch": torch.__version__,
        "cells": cells,
    }
    write_atomically(out / f"{recipe.name}.json", json.dumps(result, indent=1))
    write_atomically(out / f"{recipe.name}.md", markdown(result))
    draw(result, out / f"similarity-{recipe.name}.png")
    return result


def _task(setup: Setup, elastic: ElasticViT) -> tuple[TaskRecipe, TaskWeights | None]:
    """Returns the recipe and the task's weights, or None for the model's own head."""
    if setup.tasks is not None:
        found = load_tasks(setup.tasks, elastic.shape)
        if len(found) != 1:
            raise ValueError(f"{setup.tasks} holds {len(found)} tasks; one is needed")
        return found[0].recipe, found[0].weights
    recipe = read_recipe(setup.task)
    if elastic.classes != len(recipe.classes):
        raise ValueError(
            f"the model's head has {elastic.classes} classes and task {recipe.name!r} has {len(recipe.classes)}: give "
            "--tasks with the task's files"
        )
    return recipe, None


def _key(gamma: int, schedule: Schedule) -> str:
    return f"{gamma}: {' '.join(str(-cut) for cut in schedule)}"


def _served(runner: ElasticRunner, weights: TaskWeights | None) -> ServedTask:
    return runner.own_task() if weights is None else runner.prepare(weights)


def _cell(
    setup: Setup,
    elastic: ElasticViT,
    pixels: PixelSpec,
    made: Mapping[tuple[int, Schedule], ElasticViT],
    weights: TaskWeights | None,
    pictures: LabelledImages,
    seed: int,
) -> dict[str, Any]:
    order_N = np.random.default_rng([seed, 11]).permutation(len(pictures))
    choosing = pictures.only(order_N[: setup.choosing])
    tested = pictures.only(order_N[setup.choosing : setup.choosing + setup.tested])
    whole = ElasticRunner(elastic, pixels)
    found: dict[str, Any] = {"whole": accuracy(whole, _served(whole, weights), tested, 0), "schedules": {}}
    for (gamma, schedule), model in made.items():
        runner = ElasticRunner(model, pixels)
        task = _served(runner, weights)
        found["schedules"][_key(gamma, schedule)] = {
            "choosing": accuracy(runner, task, choosing, gamma),
            "test": accuracy(runner, task, tested, gamma),
        }
    return found


def images_per_s(
    made: Mapping[tuple[int, Schedule], ElasticViT],
    elastic: ElasticViT,
    pixels: PixelSpec,
    weights: TaskWeights | None,
    *,
    size: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[tuple[int, Schedule], float]:
    """Returns images per second at the median time of a batch. All schedules take turns within each repeat.

    All tokens are measured too, as gamma 0 without a schedule.
    """
    models = {(0, ()): elastic, **made}
    pictures = np.random.default_rng(0).integers(0, 256, (size, elastic.image_px, elastic.image_px, 3), np.uint8)
    ready = {}
    for key, model in models.items():
        runner = ElasticRunner(model, pixels)
        ready[key] = (runner, [_served(runner, weights)] * size)
    took_s: dict[tuple[int, Schedule], list[float]] = {key: [] for key in models}
    for repeat in range(repeats + 1):
        for key, (runner, tasks) in ready.items():
            began_s = clock()
            runner.answer(pictures, key[0], tasks)
            if repeat:  # the first round prepares memory
                took_s[key].append(clock() - began_s)
    return {key: size / statistics.median(times) for key, times in took_s.items()}


@torch.inference_mode()
def similarity(runner: ElasticRunner, labelled: LabelledImages) -> list[dict[str, Any]]:
    """Returns, for each layer, the mean and the percentiles of the cosine between two tokens' keys.

    Each pair of different unprotected tokens of a picture counts once, at gamma 0. Percentiles are those in PERCENTS.
    """
    model = runner.model
    images_BCHW = runner.images(labelled.pictures_NHWC)
    found = []
    for keys_BND in model.layer_keys(images_BCHW):
        unit_BND = functional.normalize(keys_BND[:, model.protected :].float(), dim=-1)
        cosines_BNN = unit_BND @ unit_BND.mT
        rows, columns = np.triu_indices(cosines_BNN.shape[1], k=1)
        cosines_P: npt.NDArray[np.float32] = cosines_BNN[:, rows, columns].flatten().numpy()
        found.append(
            {"mean": float(cosines_P.mean()), "percentiles": np.percentile(cosines_P, PERCENTS).round(4).tolist()}
        )
    return found


def best(cell: Mapping[str, Any], gamma: int) -> str:
    """Returns the schedule of a gamma that is best on the choosing pictures; the first one wins a tie."""
    found: dict[str, float] = {
        key: of["choosing"] for key, of in cell["schedules"].items() if key.startswith(f"{gamma}: ")
    }
    return max(found, key=lambda key: found[key])


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the table: test accuracy by schedule, points over the uniform one in pairs, and throughput."""
    cells, times = result["cells"], result["times"]
    rates = times["images_per_s"] if times else {}
    head = "| gamma | merges in each layer | accuracy, % | over the same in every layer, points | operations |"
    lines = [head + (" images/s |" if rates else ""), "| --- |" + " --- |" * (5 if rates else 4)]

    def rate(key: str) -> str:
        return f" {rates[key]:.0f} |" if rates else ""

    whole = [cell["whole"] for cell in cells]
    lines.append(f"| 0 | none | {100 * statistics.fmean(whole):.2f} | | |{rate('0: ')}")
    for gamma in sorted(result["setup"]["gammas"], reverse=True):
        keys = [key for key in cells[0]["schedules"] if key.startswith(f"{gamma}: ")]
        uniform = [cell["schedules"][keys[0]]["test"] for cell in cells]
        for key in keys:
            tested = [cell["schedules"][key]["test"] for cell in cells]
            share = result["operations"][key] / result["operations"][keys[0]]
            over = (
                "" if key == keys[0] else in_points([one - other for one, other in zip(tested, uniform, strict=True)])
            )
            lines.append(
                f"| {gamma} | {key.partition(': ')[2]} | {100 * statistics.fmean(tested):.2f} | {over} | {share:.2f} |"
                + rate(key)
            )
        chosen = [cell["schedules"][best(cell, gamma)]["test"] for cell in cells]
        lines.append(
            f"| {gamma} | chosen on other pictures | {100 * statistics.fmean(chosen):.2f} | "
            f"{in_points([one - other for one, other in zip(chosen, uniform, strict=True)])} | |"
            + (" |" if rates else "")
        )
    layers = result["similarity"]
    lines += ["", "| cosine of two tokens' keys, layer | " + " | ".join(map(str, range(len(layers)))) + " |"]
    lines.append("| --- |" + " --- |" * len(layers))
    lines.append("| mean | " + " | ".join(f"{layer['mean']:.2f}" for layer in layers) + " |")
    for percent in (10, 50, 90):
        place = PERCENTS.index(percent)
        shown = " | ".join(f"{layer['percentiles'][place]:.2f}" for layer in layers)
        lines.append(f"| {percent} % below | {shown} |")
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws the cumulative distribution of the cosine between two tokens' keys, a curve per layer (figure 3.8)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    layers = result["similarity"]
    for place, layer in enumerate(layers):
        color = colormaps["viridis"](place / max(1, len(layers) - 1))
        axes.plot(layer["percentiles"], [percent / 100 for percent in PERCENTS], color=color, label=f"layer {place}")
    axes.set(xlabel="cosine of two tokens' keys", ylabel="share of pairs below", title="Similarity of tokens by layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write_atomically(path, png(figure))
