"""Adds a task's variants to a folder: copies their files, and measures accuracy, times, bytes and loading.

As INFaaS profiles a variant when it is registered. Times belong to a size, not to a task, so they are measured with the
first task of a folder. The bytes of a size are those of its largest model.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np

from isthmus.cloud.elastic.model.configuration import FILE as CONFIGURATION
from isthmus.cloud.elastic.model.executor import Image
from isthmus.cloud.elastic.model.runner import NumberType
from isthmus.cloud.elastic.model.weights import ModelError, located
from isthmus.cloud.elastic.policies.infaas import SIZE_NAMES, ModelSize
from isthmus.cloud.elastic.prepare.profiler import SIZES as BATCHES
from isthmus.cloud.elastic.prepare.profiler import OnStep, accuracy, ignore_steps, machine_key, measure_latency
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.tasks.recipes import TaskRecipe
from isthmus.cloud.elastic.variants.folder import FILE, BadVariants, TaskVariants, Variants, file_in
from isthmus.cloud.elastic.variants.opening import Ready, classes_of, is_cuda, opened, same_pictures, shapes_of
from isthmus.data.files import write_atomically
from isthmus.data.images import LabelledImages, PixelSpec

LOADS: Final = 5
"""Loads per timing."""


def add_task(
    folder: Path,
    recipe: TaskRecipe,
    sources: Mapping[int, str],
    pictures: Callable[[PixelSpec], LabelledImages],
    *,
    pixels: str | None,
    device: str,
    number_type: NumberType,
    batches: Sequence[int] = BATCHES,
    repeats: int = 5,
    on_step: OnStep = ignore_steps,
) -> Variants:
    """Adds or replaces the variants of ``recipe``'s task, and writes the folder's description.

    ``sources`` names the model of each level, and ``pictures`` reads labelled pictures as the models see them.
    ``batches`` are the sizes that are timed.

    Raises BadVariants, ModelError or ValueError for models that do not fit the task, each other, or the folder, before
    anything is written.
    """
    before = Variants.read(folder) if (folder / FILE).is_file() else None
    if 0 not in sources:
        raise BadVariants("a base model is needed: the load is measured by what it serves")
    if before is not None and before.profile.gammas != tuple(sorted(sources)):
        have = ", ".join(SIZE_NAMES[level] for level in before.profile.gammas)
        raise BadVariants(f"all tasks of {folder} must have the sizes {have}: give these, or name another folder")
    files = {level: _file(source) for level, source in sorted(sources.items())}
    ready = {
        level: opened(source, pixels=pixels, device=device, number_type=number_type)
        for level, source in sorted(sources.items())
    }
    _check(recipe, ready, before, device, number_type)
    labelled = recipe.apply(pictures(ready[0].runner.pixels))
    shares: dict[int, float] = {}
    for done, (level, one) in enumerate(ready.items()):
        shares[level] = accuracy(one.runner, one.task, labelled, 0)
        on_step("accuracy", done + 1, len(ready))
    hashes = {level: machine_key(one.runner).model_hash for level, one in ready.items()}
    for level, source in files.items():
        _copy(source, file_in(folder, recipe.name, level), _architecture(sources[level]))
    task = TaskVariants(recipe.classes, hashes)
    if before is None:
        measured = _times(ready, batches, repeats, on_step)
        profile = Profile(machine_key(ready[0].runner), tuple(ready), tuple(sorted(batches)), {}, measured)
        copies = {level: file_in(folder, recipe.name, level) for level in ready}
        sizes = []
        for level, one in ready.items():
            load_s = _load_s(copies[level], pixels, device, number_type)
            cost = measured[level][-1] / measured[0][-1]
            sizes.append(ModelSize(level, one.bytes, load_s, cost))
            on_step("loading", len(sizes), len(ready))
        made = Variants(folder, profile.with_task(recipe.name, shares), tuple(sizes), {recipe.name: task}, pixels)
    else:
        # The heads of tasks differ in size: a size takes what its largest model takes.
        sizes = [replace(size, memory_bytes=max(size.memory_bytes, ready[size.level].bytes)) for size in before.sizes]
        made = replace(before.with_task(recipe.name, task, shares), sizes=tuple(sizes))
    write_atomically(folder / f"{recipe.name}.recipe.json", json.dumps(asdict(recipe), indent=1))
    made.write()
    return made


def _file(source: str) -> Path:
    _, path = located(source)
    if path is None or Path(source).is_dir():
        raise ModelError(f"{source}: name a safetensors file, or ARCHITECTURE=FILE; its weights are copied")
    return path


def _architecture(source: str) -> str | None:
    return located(source)[0]


def _check(
    recipe: TaskRecipe, ready: Mapping[int, Ready], before: Variants | None, device: str, number_type: NumberType
) -> None:
    for level, one in ready.items():
        name = SIZE_NAMES[level]
        if classes_of(one) != len(recipe.classes):
            raise BadVariants(
                f"the {name} model has a head of {classes_of(one)} classes, and task {recipe.name!r} has "
                f"{len(recipe.classes)}"
            )
        if not same_pictures(one.runner, ready[0].runner):
            raise BadVariants(f"the {name} model reads pictures in another way than the base model")
    if before is None:
        return
    key = machine_key(ready[0].runner)
    for what in ("processor", "device", "threads", "number_type"):
        there, here = getattr(before.profile.key, what), getattr(key, what)
        if there != here:
            raise BadVariants(
                f"{before.folder} was measured with {what} {there!r}, and here it is {here!r}: name another folder"
            )
    other = next(iter(before.tasks))
    for level, one in ready.items():
        known = opened(before.file(other, level), pixels=before.pixels, device=device, number_type=number_type)
        if shapes_of(known) != shapes_of(one) or not same_pictures(known.runner, one.runner):
            raise BadVariants(
                f"the {SIZE_NAMES[level]} model has another shape, or reads pictures in another way, than that of task "
                f"{other!r}, and both are timed as one"
            )


def _times(
    ready: Mapping[int, Ready], batches: Sequence[int], repeats: int, on_step: OnStep
) -> dict[int, tuple[float, ...]]:
    found = {}
    for done, (level, one) in enumerate(ready.items()):
        found[level] = measure_latency(one.runner, [0], batches, repeats=repeats)[0]
        on_step("time", done + 1, len(ready))
    return found


def _load_s(file: Path, pixels: str | None, device: str, number_type: NumberType) -> float:
    """Returns the median seconds from a cached file to a model on its device."""
    took_s = []
    for _ in range(LOADS):
        began_s = time.perf_counter()
        ready = opened(file, pixels=pixels, device=device, number_type=number_type)
        if is_cuda(device):
            ready.runner.answer(_blank(ready), 0, [ready.task])  # the copies to a GPU end later
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s)


def _blank(ready: Ready) -> Image:
    side = ready.runner.model.image_px
    return np.zeros((1, side, side, 3), np.uint8)


def _copy(source: Path, target: Path, architecture: str | None) -> None:
    """Copies the weights, and the config.json that says what they do not."""
    if target.exists() and source.samefile(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    beside, copy = source.parent / CONFIGURATION, target.parent / CONFIGURATION
    if beside.is_file():
        write_atomically(copy, beside.read_bytes())
    elif architecture is not None:
        write_atomically(copy, json.dumps({"architecture": architecture}))
    else:
        copy.unlink(missing_ok=True)
