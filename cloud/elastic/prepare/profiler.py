"""Measures a profile on its device: accuracy by task and gamma, seconds and bytes by gamma and batch size."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.cloud.elastic.model.runner import ElasticRunner, ServedTask
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.scheduling.levels import levels
from isthmus.cloud.elastic.scheduling.profile import MachineKey, Profile
from isthmus.cloud.elastic.tasks.router import TaskRouter
from isthmus.cloud.elastic.tasks.task import PromptMode, TaskWeights
from isthmus.cloud.processor import processor_name
from isthmus.data.images import LabelledImages
from isthmus.distill.training.checkpoint import state_hash

GAMMAS: Final = (-20, -15, -10, -5, 0, 2, 4, 8)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
ACCURACY_BATCH: Final = 32
BRIEF_S: Final = 20.0
PROBE_SIZE: Final = 4
BRIEF_MEMORY_SIZES: Final = (1, 8)
"""A brief measurement extends the memory of these batches to larger ones in a straight line. Counting bytes takes
longer than running the batch, and memory does not grow faster than the batch."""

OnStep = Callable[[str, int, int], None]
"""Called with the name of the measurement, the number of steps done, and the number of all steps."""


def ignore_steps(_what: str, _done: int, _all: int) -> None:
    """Does nothing: an ``on_step`` for callers without a progress display."""


def machine_key(runner: ElasticRunner) -> MachineKey:
    """Returns what a profile measured with this runner is valid for. The threads are torch's current setting."""
    on_gpu = runner.device.type == "cuda"
    return MachineKey(
        processor=processor_name(),
        device=torch.cuda.get_device_name(runner.device) if on_gpu else "cpu",
        threads=torch.get_num_threads(),
        number_type=runner.number_type,
        model_hash=runner.model.identity or state_hash([runner.model]),
    )


def measure(
    runner: ElasticRunner,
    *,
    gammas: Sequence[int] = GAMMAS,
    sizes: Sequence[int] = SIZES,
    mode: PromptMode = "append",
    tasks: Mapping[str, tuple[ServedTask, LabelledImages]] | None = None,
    repeats: int = 5,
    memory_sizes: Sequence[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_step: OnStep = ignore_steps,
) -> Profile:
    """Measures a whole profile. Memory is measured at ``memory_sizes``, the smallest first, or at all of ``sizes``.

    Times above gamma 0 are those of prompt mode ``mode``. If tasks use both modes, use the slower one, "append".
    If the model has experts, ``gammas`` are levels (scheduling/levels.py). Raises ValueError for gammas or sizes that
    do not fit the model.
    """
    latency_s = measure_latency(runner, gammas, sizes, mode=mode, repeats=repeats, clock=clock, on_step=on_step)
    counted = sorted(sizes) if memory_sizes is None else sorted(set(memory_sizes) & set(sizes))
    memory = _extended(measure_memory(runner, gammas, counted, mode=mode, on_step=on_step), counted, sizes)
    accuracy = measure_accuracy(runner, tasks or {}, gammas, on_step=on_step)
    return Profile(
        key=machine_key(runner),
        gammas=tuple(sorted(gammas)),
        sizes=tuple(sorted(sizes)),
        accuracy=accuracy,
        latency_s=latency_s,
        memory=memory,
        schedules={gamma: cuts for gamma, cuts in runner.model.schedules.items() if gamma in gammas},
        merge_order=runner.model.merge_order,
        experts=runner.model.experts.k,
    )


def measure_briefly(runner: ElasticRunner, *, on_step: OnStep = ignore_steps, budget_s: float = BRIEF_S) -> Profile:
    """Measures a profile in about ``budget_s``: fewer repeats and smaller batches than ``measure``, as far as needed.

    Memory is measured for small batches alone.

    The gammas are the usual ones that the model's tokens allow, with all numbers of experts if it has some.
    """
    most, usual = runner.model.reducer.most, runner.model.experts.k
    gammas = levels([gamma for gamma in GAMMAS if -gamma <= most], range(1, usual + 1), usual)
    served = runner.prepare(blank_weights(runner.model, gammas))
    side = runner.model.image_px
    took_s = []
    for size in (1, 1, PROBE_SIZE):  # the first batch prepares memory and code
        began_s = time.perf_counter()
        runner.answer(np.zeros((size, side, side, 3), np.uint8), 0, [served] * size)
        took_s.append(time.perf_counter() - began_s)
    image_s = took_s[-1] / PROBE_SIZE
    # Each size runs once per gamma in a first round, and once per repeat. The smaller sizes together take as long again
    # as the largest one.
    sizes = [size for size in SIZES if size <= PROBE_SIZE or 2 * size * image_s * len(gammas) * 3 <= budget_s]
    repeats = max(1, min(5, int(budget_s / (sum(sizes) * image_s * len(gammas))) - 1))
    return measure(
        runner, gammas=gammas, sizes=sizes, repeats=repeats, memory_sizes=BRIEF_MEMORY_SIZES, on_step=on_step
    )


def measure_latency(
    runner: ElasticRunner,
    gammas: Sequence[int],
    sizes: Sequence[int],
    *,
    mode: PromptMode = "append",
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    on_step: OnStep = ignore_steps,
) -> dict[int, tuple[float, ...]]:
    """Returns the median seconds of a batch: by gamma, one number per ascending size.

    A batch includes standardising, the model and one head. Within each repeat all pairs (gamma, size) take turns, so a
    machine that slows down affects all of them alike.
    """
    pairs = [(gamma, size) for size in sorted(sizes) for gamma in sorted(gammas)]
    served = runner.prepare(blank_weights(runner.model, gammas), mode)
    side = runner.model.image_px
    pictures = np.random.default_rng(0).integers(0, 256, (max(sizes), side, side, 3), np.uint8)
    took_s: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for repeat in range(repeats + 1):
        for done, (gamma, size) in enumerate(pairs):
            began_s = clock()
            runner.answer(pictures[:size], gamma, [served] * size)  # it ends with a copy of the logits to the host
            if repeat:
                took_s[gamma, size].append(clock() - began_s)
            on_step("time", repeat * len(pairs) + done + 1, (repeats + 1) * len(pairs))
    return {gamma: tuple(statistics.median(took_s[gamma, size]) for size in sorted(sizes)) for gamma in sorted(gammas)}


def measure_memory(
    runner: ElasticRunner,
    gammas: Sequence[int],
    sizes: Sequence[int],
    *,
    mode: PromptMode = "append",
    on_step: OnStep = ignore_steps,
) -> dict[int, tuple[int, ...]]:
    """Returns the peak bytes of a batch, without the weights: by gamma, one number per ascending size.

    On a GPU, the allocator counts them. Elsewhere it is the largest sum of tensors alive at once in an eager run,
    without the scratch space inside operators.
    """
    served = runner.prepare(blank_weights(runner.model, gammas), mode)
    side = runner.model.image_px
    found: dict[int, tuple[int, ...]] = {}
    for done, gamma in enumerate(sorted(gammas)):
        peaks = []
        for size in sorted(sizes):
            pictures = np.zeros((size, side, side, 3), np.uint8)
            if runner.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(runner.device)
                held = torch.cuda.memory_allocated(runner.device)
                runner.answer(pictures, gamma, [served] * size)
                peaks.append(max(1, torch.cuda.max_memory_allocated(runner.device) - held))
            else:
                with LiveBytes() as live:
                    runner.plain().answer(pictures, gamma, [served] * size)
                peaks.append(max(1, live.peak))
        found[gamma] = tuple(peaks)
        on_step("memory", done + 1, len(gammas))
    return found


def _extended(
    memory: Mapping[int, tuple[int, ...]], counted: Sequence[int], sizes: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Returns the bytes of every size: as counted, and beyond the largest counted size in a straight line."""
    found = {}
    for gamma, row in memory.items():
        slope = (row[-1] - row[0]) / (counted[-1] - counted[0]) if len(counted) > 1 else row[0] / counted[0]
        found[gamma] = tuple(
            math.ceil(np.interp(size, counted, row) + max(0.0, slope) * max(0, size - counted[-1]))
            for size in sorted(sizes)
        )
    return found


def measure_accuracy(
    runner: ElasticRunner,
    tasks: Mapping[str, tuple[ServedTask, LabelledImages]],
    gammas: Sequence[int],
    *,
    on_step: OnStep = ignore_steps,
) -> dict[str, dict[int, float]]:
    """Returns each task's accuracy by gamma. It is 0 at gammas above 0 for which the task has no prompts."""
    found: dict[str, dict[int, float]] = {}
    steps, done = len(tasks) * len(gammas), 0
    for name, (task, labelled) in tasks.items():
        shares: dict[int, float] = {}
        for gamma in sorted(gammas):
            able = gamma <= 0 or gamma in task.prompts
            shares[gamma] = accuracy(runner, task, labelled, gamma) if able else 0.0
            done += 1
            on_step("accuracy", done, steps)
        found[name] = shares
    return found


def accuracy(runner: ElasticRunner, task: ServedTask, labelled: LabelledImages, gamma: int) -> float:
    """Returns the accuracy on ``labelled``: the share of pictures whose largest logit is the label's."""
    right = 0
    for first in range(0, len(labelled), ACCURACY_BATCH):
        pictures = labelled.pictures_NHWC[first : first + ACCURACY_BATCH]
        logits_BC = np.stack(runner.answer(pictures, gamma, [task] * len(pictures)))
        right += int((logits_BC.argmax(axis=1) == labelled.labels_N[first : first + ACCURACY_BATCH]).sum())
    return right / len(labelled)


@torch.inference_mode()
def key_similarity(runner: ElasticRunner, labelled: LabelledImages) -> tuple[float, ...]:
    """Returns, by layer, the mean cosine between the keys of two different unprotected tokens of a picture.

    Similar tokens can be merged at little cost (figure 3.8 of J. Chen's thesis).
    """
    sums = np.zeros(runner.model.depth)
    for first in range(0, len(labelled), ACCURACY_BATCH):
        images_BCHW = runner.images(labelled.pictures_NHWC[first : first + ACCURACY_BATCH])
        for layer, keys_BND in enumerate(runner.model.layer_keys(images_BCHW)):
            free_BND = keys_BND[:, runner.model.protected :].float()
            sum_BD = torch.nn.functional.normalize(free_BND, dim=-1).sum(dim=1)
            tokens = free_BND.shape[1]
            alike_B = (sum_BD.square().sum(dim=1) - tokens) / (tokens * (tokens - 1))
            sums[layer] += float(alike_B.sum())
    return tuple((sums / len(labelled)).tolist())


def blank_weights(model: ElasticViT, gammas: Sequence[int]) -> TaskWeights:
    """Makes a task of zeros with prompts for every gamma. It takes as long to run as a real task.

    Its router, if the model has experts, is random: zeros would send all tokens to the same few experts.
    """
    prompts_LGD = {
        gamma: np.zeros((model.depth, gamma, model.width), np.float32) for gamma in sorted(gammas) if gamma > 0
    }
    router = TaskRouter.blank(model.experts, model.width) if model.expert_layers else None
    return TaskWeights(np.zeros((2, model.width), np.float32), np.zeros(2, np.float32), prompts_LGD, router)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside and alive at once; ``peak`` is the maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in _stored(args)}
        out = func(*args, **(kwargs or {}))
        self._alive = {address: held for address, held in self._alive.items() if not held[0].expired()}
        for made in _stored(out):
            storage = made.untyped_storage()
            if storage.data_ptr() not in given:
                self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _stored(tree: Any) -> list[Tensor]:
    """Returns the tensors with visible memory. oneDNN hides the memory of packed weights, which no batch allocates."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
