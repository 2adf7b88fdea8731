"""Prompts on a task that the backbone has not seen: from scratch against iterative (table 3.1 and figure 3.9 of OTAS).

The backbone learns some of the classes with all its weights and is frozen. A head and prompts then learn the other
classes. A seed draws which classes these are, all pictures, and all starts. With the task "details" the backbone is the
given model as it is, and the classes are readings of generated marks that it has never seen.

All prompts of a seed begin with the same head, see the same pictures, and are tested on the same pictures, so they are
compared in pairs. Where we differ from the paper: the head is learned at gamma 0 and then fixed, because one head
serves all gammas of a task; one variant learns a head of its own beside the prompts, as the paper does.
"""

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.timm_import import VisionTransformer
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.prepare import prompts
from isthmus.cloud.elastic.prepare.inputs import opened, pictures_of
from isthmus.cloud.elastic.prepare.profiler import accuracy
from isthmus.cloud.elastic.scheduling.merge_order import MergeOrder
from isthmus.cloud.elastic.tasks.files import TaskFiles
from isthmus.cloud.elastic.tasks.recipes import LEFT_OUT, TaskRecipe
from isthmus.cloud.elastic.tasks.task import TaskSpec, TaskWeights
from isthmus.cloud.warmup.tuning import with_head
from isthmus.data.files import write_atomically
from isthmus.data.images import CIFAR10_CLASSES, LabelledImages, PixelSpec
from isthmus.data.made_by import made_by
from isthmus.data.synthetic.details import detail_classes, with_details
from isthmus.distill.figures import png
from isthmus.distill.recipes import TrainConfig
from isthmus.distill.training.loop import EpochReport, fit
from isthmus.experiments.elastic.kept import merge_order_in, read_cell
from isthmus.experiments.elastic.spread import in_points

Report = Callable[[str], None]
TaskKind = Literal["unseen", "details"]
CPU: Final = torch.device("cpu")
LABELS: Final = len(CIFAR10_CLASSES)
CURVE_PICTURES: Final = 200
"""Accuracy after each epoch (figure 3.9) is measured on at most this many of the test pictures."""


@dataclass(frozen=True)
class Setup:
    """What is learned, on what, and for how long.

    ``known`` classes are learned by the backbone, with ``backbone_merges`` tokens merged per layer in all but the last
    epoch (which is faster), and the rest by prompts. ``patch_px`` is the side of its patches; None: that of the model.
    ``pictures`` are those that prompts learn from.
    """

    model: str
    data: Path
    test: Path
    statistics: str | None = None
    task: TaskKind = "unseen"
    known: int = 5
    backbone_pictures: int = 25_000
    backbone_epochs: int = 20
    backbone_merges: int = 0
    patch_px: int | None = None
    pictures: int = 5_000
    tested: int = 2_500
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    gammas: tuple[int, ...] = (2, 4, 8)
    merged: tuple[int, ...] = (-24, -16, -8)
    marks: int = 2

    def config(self, seed: int, epochs: int) -> prompts.PromptConfig:
        """Returns how to learn prompts. Marks are read from left to right, so their pictures are not mirrored."""
        train = dataclasses.replace(
            prompts.PROMPTS,
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            augment=self.task == "unseen",
        )
        return prompts.PromptConfig(self.gammas, prompts=train, seed=seed)


@dataclass(frozen=True)
class Variant:
    """Prompts for ``gamma`` that begin at those of ``start`` (None: averages of tokens), for ``epochs`` epochs."""

    gamma: int
    name: str
    start: str | None
    epochs: int
    own_head: bool = False


def variants(gammas: Sequence[int], epochs: int) -> list[Variant]:
    """Returns what is compared: for each gamma from scratch and iteratively, and the middle one in two more ways."""
    found: list[Variant] = []
    for place, gamma in enumerate(gammas):
        found.append(Variant(gamma, f"{gamma}, from scratch", None, epochs))
        if place:
            chain = "from scratch" if place == 1 else f"from {gammas[place - 2]}"
            start = f"{gammas[place - 1]}, {chain}"
            found.append(Variant(gamma, f"{gamma}, from {gammas[place - 1]}", start, epochs))
        if place == 1:
            found.append(Variant(gamma, f"{gamma}, from scratch, twice as long", None, 2 * epochs))
            found.append(Variant(gamma, f"{gamma}, from scratch, own head", None, epochs, own_head=True))
    return found


class WithHead(prompts.PromptedTask):
    """Prompts that are learned together with a head of their own."""

    def __init__(self, model: ElasticViT, head: nn.Linear, prompts_LGD: Tensor):
        own = copy.deepcopy(head).requires_grad_(True)
        super().__init__(model, own, prompts_LGD, "append")
        self.head = own


def unlearned(model: ElasticViT, classes: int, seed: int, patch_px: int | None = None) -> ElasticViT:
    """Returns a model of the same shape with random weights, which all learn.

    With ``patch_px`` it is a plain ViT of that shape but for its patches, of this side. Raises ValueError if they do
    not fill the picture.
    """
    if patch_px is not None and model.image_px % patch_px:
        raise ValueError(f"patches of {patch_px} pixels do not fill pictures of {model.image_px}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if patch_px is None:
            vit = copy.deepcopy(model.vit)
        else:
            vit = VisionTransformer(
                model.image_px, patch_px, embed_dim=model.width, depth=model.depth, num_heads=model.heads
            )
        for module in vit.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not vit and reset is not None:
                reset()
        vit.init_weights("")
    fresh = with_head(ElasticViT(vit, merge_order=model.merge_order), classes, seed)
    return fresh.requires_grad_(True)


def halves(seed: int, known: int) -> tuple[TaskRecipe, TaskRecipe]:
    """Returns the task of the classes that the backbone learns, and that of the others."""
    order = np.random.default_rng([seed, 7]).permutation(LABELS)

    def of(name: str, labels: Sequence[int]) -> TaskRecipe:
        places = {int(label): place for place, label in enumerate(sorted(labels))}
        names = tuple(CIFAR10_CLASSES[label] for label in places)
        return TaskRecipe(name, names, tuple(places.get(label, LEFT_OUT) for label in range(LABELS)))

    return of("known", order[:known].tolist()), of("unseen", order[known:].tolist())


def run(
    setup: Setup, *, seeds: Sequence[int], out: Path, report: Report, merge_order: MergeOrder | None = None
) -> dict[str, Any]:
    """Learns what is missing of each seed, writes ``out/result.json``, ``.md`` and a picture. Returns the result.

    ``merge_order``: None for that of a run that is continued, or the default. Raises ValueError if ``out`` has cells of
    another setup or order, and what reading models and pictures raises.
    """
    if not 2 <= setup.known <= LABELS - 2:
        raise ValueError(f"{setup.known} known classes: must be from 2 to {LABELS - 2}, so that two are left to learn")
    made = made_by(out, report)
    order = merge_order_in(out, merge_order)
    given, pixels = opened(setup.model, setup.statistics, merge_order=order)
    named = {"model": Path(setup.model).name, "data": setup.data.name, "test": setup.test.name}
    plain: dict[str, Any] = json.loads(json.dumps({**vars(setup), **named}))
    cells = []
    for seed in seeds:
        path = out / "cells" / f"{setup.task}-{seed}.json"
        if not path.is_file():
            began_s = time.process_time()
            cell = _cell(setup, given, pixels, seed, out, report)
            cell |= {"seed": seed, "processor_s": round(time.process_time() - began_s, 1)}
            write_atomically(path, json.dumps({**cell, "setup": plain}, indent=1))
        cells.append(read_cell(path, plain))
    result = {"what": "prompts on a task that the backbone has not seen", "setup": plain, "seeds": list(seeds)}
    result |= {"merge_order": order, "code": made, "torch": torch.__version__, "cells": cells}
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    write_atomically(out / "result.md", markdown(result))
    draw(result, out / "learning.png")
    return result


def _cell(setup: Setup, given: ElasticViT, pixels: PixelSpec, seed: int, out: Path, report: Report) -> dict[str, Any]:
    found: dict[str, Any] = {}
    learning, tested = (pictures_of(path, pixels, None, seed) for path in (setup.data, setup.test))
    if setup.task == "details":
        model, classes = given, detail_classes(setup.marks)
        recipe = TaskRecipe("details", classes, tuple(range(len(classes))))
        learning = with_details(_some(learning, setup.pictures, seed), seed=seed, marks=setup.marks)
        tested = with_details(_some(tested, setup.tested, seed), seed=seed + 1_000, marks=setup.marks)
    else:
        known, recipe = halves(seed, setup.known)
        found |= {"known": known.classes, "unseen": recipe.classes}
        model, found["backbone"] = _backbone(setup, given, pixels, known, learning, tested, seed, out, report)
        learning = _some(recipe.apply(learning), setup.pictures, seed)
        tested = _some(recipe.apply(tested), setup.tested, seed)
    model.eval().requires_grad_(False)
    runner = ElasticRunner(model, pixels)
    count = len(recipe.classes)
    head = prompts.learn_head(
        model, pixels, learning, count, setup.config(seed, 1), checkpoint=None, key="", device=CPU
    )
    head_CD, bias_C = _numbers(head.weight), _numbers(head.bias)

    def test(weights: TaskWeights, gamma: int, pictures: LabelledImages) -> float:
        return accuracy(runner, runner.prepare(weights), pictures, gamma)

    alone = TaskWeights(head_CD, bias_C, {})
    found["head"] = {str(gamma): test(alone, gamma, tested) for gamma in (*setup.merged, 0)}
    report(f"seed {seed}: {recipe.name}, head alone {found['head']['0']:.1%}")
    few = tested.spread(CURVE_PICTURES)
    first = test(alone, 0, few)
    tokens_LND = prompts.mean_tokens(model, pixels, learning, CPU)
    learned: dict[str, Tensor] = {}
    found["variants"] = {}
    for variant in variants(setup.gammas, setup.epochs):
        before = None if variant.start is None else learned[variant.start]
        start = prompts.first_prompts(tokens_LND, variant.gamma, before)
        task = WithHead(model, head, start) if variant.own_head else prompts.PromptedTask(model, head, start, "append")
        curve: list[float] = []
        losses: list[float] = []

        def weights_of(task: prompts.PromptedTask = task, gamma: int = variant.gamma) -> TaskWeights:
            own = task.head if isinstance(task, WithHead) else head
            return TaskWeights(_numbers(own.weight), _numbers(own.bias), {gamma: _numbers(task.prompts_LGD)})

        def after(
            _what: str,
            epoch: EpochReport,
            curve: list[float] = curve,
            losses: list[float] = losses,
            weights_of: Callable[[], TaskWeights] = weights_of,
            gamma: int = variant.gamma,
        ) -> None:
            losses.append(epoch.loss)
            curve.append(test(weights_of(), gamma, few))

        curve.append(test(weights_of(), variant.gamma, few))
        config = setup.config(seed, variant.epochs)
        prompts.learn_prompts(task, pixels, learning, config, checkpoint=None, key="", device=CPU, on_epoch=after)
        learned[variant.name] = task.prompts_LGD.detach()
        share = test(weights_of(), variant.gamma, tested)
        found["variants"][variant.name] = {"gamma": variant.gamma, "accuracy": share, "curve": curve, "losses": losses}
        report(f"seed {seed}: {variant.name} {share:.1%}")
    found["head_on_curve"] = first
    chain = {
        variant.gamma: _numbers(learned[variant.name])
        for variant in variants(setup.gammas, setup.epochs)
        if variant.start is not None or variant.gamma == setup.gammas[0]
    }
    spec = TaskSpec(recipe.name, recipe.classes, accuracy={int(gamma): of for gamma, of in found["head"].items()})
    TaskFiles(recipe, spec, TaskWeights(head_CD, bias_C, chain)).save(out / f"tasks-{seed}", model.merge_order)
    return found


def _some(labelled: LabelledImages, count: int, seed: int) -> LabelledImages:
    order_N = np.random.default_rng([seed, len(labelled)]).permutation(len(labelled))
    return labelled.only(np.sort(order_N[:count]))


def _numbers(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy().copy()


def _backbone(
    setup: Setup,
    given: ElasticViT,
    pixels: PixelSpec,
    known: TaskRecipe,
    learning: LabelledImages,
    tested: LabelledImages,
    seed: int,
    out: Path,
    report: Report,
) -> tuple[ElasticViT, dict[str, float]]:
    """Returns a model that learned the known classes from nothing, and its test accuracy on them.

    It is kept in ``out``, and an interrupted run continues.
    """
    model = unlearned(given, len(known.classes), seed, setup.patch_px)
    pictures = _some(known.apply(learning), setup.backbone_pictures, seed)
    path, checkpoint = out / f"backbone-{seed}.safetensors", out / f"backbone-{seed}.learning.safetensors"
    if path.is_file():
        model.vit.load_state_dict(safetensors.torch.load_file(path))
    else:
        train = TrainConfig(
            epochs=setup.backbone_epochs,
            batch_size=64,
            optimizer="adamw",
            learning_rate=1e-3,
            weight_decay=0.05,
            schedule="cosine",
            warmup_epochs=min(1.0, setup.backbone_epochs / 10),
            label_smoothing=0.1,
        )
        data = prompts.Pictures(pictures, pixels, augment=True, seed=seed)
        whole_from = setup.backbone_epochs - 1 if setup.backbone_merges else 0
        for gamma, until in ((-setup.backbone_merges, whole_from), (0, setup.backbone_epochs)):

            def loss(batch: Sequence[Tensor], gamma: int = gamma) -> Tensor:
                return functional.cross_entropy(model(batch[0], gamma), batch[1], label_smoothing=0.1)

            fit(
                model,
                data,
                loss,
                train,
                seed=seed,
                run=f"backbone {seed} {pictures.digest()}",
                checkpoint=checkpoint,
                until_epoch=until,
                device=CPU,
                on_epoch=lambda epoch: report(
                    f"seed {seed}: backbone, epoch {epoch.epoch} of {epoch.epochs}, loss {epoch.loss:.3f}"
                ),
            )
        write_atomically(
            path, safetensors.torch.save({name: of.contiguous() for name, of in model.vit.state_dict().items()})
        )
        write_atomically(out / "config.json", json.dumps({"model_args": {"num_heads": model.heads}}))
        checkpoint.unlink(missing_ok=True)
    runner = ElasticRunner(model, pixels)
    some = _some(known.apply(tested), setup.tested, seed)
    shares = {str(gamma): accuracy(runner, runner.own_task(), some, gamma) for gamma in (*setup.merged, 0)}
    report(f"seed {seed}: backbone, {shares['0']:.1%} of {len(known.classes)} known classes")
    return model, shares


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the tables of a result: accuracy by seed, and differences in pairs, in points with standard errors."""
    cells = result["cells"]
    seeds = " | ".join(f"seed {cell['seed']}" for cell in cells)
    lines = [f"| accuracy, % | {seeds} | mean | less the head alone, points |", f"| --- |{' --- |' * (len(cells) + 2)}"]

    def row(name: str, values: Sequence[float], less: Sequence[float] | None) -> None:
        shown = " | ".join(f"{100 * value:.2f}" for value in values)
        gained = "" if less is None else in_points([one - other for one, other in zip(values, less, strict=True)])
        lines.append(f"| {name} | {shown} | {100 * statistics.fmean(values):.2f} | {gained} |")

    if "backbone" in cells[0]:
        row("backbone, the classes it knows", [cell["backbone"]["0"] for cell in cells], None)
    alone = [cell["head"]["0"] for cell in cells]
    row("head alone", alone, None)
    for gamma in sorted((int(key) for key in cells[0]["head"] if key != "0"), reverse=True):
        row(f"head alone, {-gamma} merges per layer", [cell["head"][str(gamma)] for cell in cells], alone)
    of = {name: [cell["variants"][name]["accuracy"] for cell in cells] for name in cells[0]["variants"]}
    for name, values in of.items():
        row(f"prompts: {name}", values, alone)
    lines += ["", "| iterative less from scratch | points |", "| --- | --- |"]
    for name, values in of.items():
        gamma, _, how = name.partition(", ")
        if how.startswith("from ") and how != "from scratch" and "," not in how:
            for other in (f"{gamma}, from scratch", f"{gamma}, from scratch, twice as long"):
                if other in of:
                    pairs = [one - two for one, two in zip(values, of[other], strict=True)]
                    lines.append(f"| {name}, less {other} | {in_points(pairs)} |")
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws accuracy by epoch, mean over seeds (figure 3.9). Epoch 0 is before any learning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    cells = result["cells"]
    for place, name in enumerate(cells[0]["variants"]):
        mean_T = np.mean([cell["variants"][name]["curve"] for cell in cells], axis=0)
        style = "-" if "scratch" in name else "--"
        axes.plot(range(len(mean_T)), 100 * mean_T, style, marker=".", color=f"C{place}", label=name)
    head = statistics.fmean(cell["head_on_curve"] for cell in cells)
    axes.axhline(100 * head, color="grey", linewidth=1, label="head alone")
    axes.set(xlabel="epoch", ylabel="accuracy, %", title="Prompts while they learn")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    write_atomically(path, png(figure))
