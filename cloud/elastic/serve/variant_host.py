"""Opens a server of model variants (INFaaS) from its settings. Its tasks are those of the folder of variants."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from isthmus.cloud.elastic.policies.infaas import SIZE_NAMES, Infaas, memory_named
from isthmus.cloud.elastic.prepare.precision import named
from isthmus.cloud.elastic.prepare.profiler import machine_key
from isthmus.cloud.elastic.scheduling.engine import Engine
from isthmus.cloud.elastic.scheduling.profile import MachineKey
from isthmus.cloud.elastic.serve.decoding import Decoder, decoded
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.cloud.elastic.serve.registry import ServedTasks
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.elastic.serve.settings import ElasticSettings
from isthmus.cloud.elastic.tasks.task import ModelShape, Task, TaskSpec, TaskWeights
from isthmus.cloud.elastic.variants.folder import BadVariants, Variants
from isthmus.cloud.elastic.variants.opening import Ready, classes_of, opened
from isthmus.cloud.elastic.variants.pool import Memory, Pool
from isthmus.data.images import PixelSpec
from isthmus.proto.errors import InvalidInput

log = logging.getLogger(__name__)


class FolderTasks(ServedTasks):
    """The tasks of a folder of variants. Their operator adds more; clients cannot."""

    def register(
        self, spec: TaskSpec, weights: Path, now_s: float, *, owner: str = "", at_most_of_owner: int | None = None
    ) -> Task:
        """Raises InvalidInput: weights of whole models are not taken from clients."""
        raise InvalidInput(
            "this server runs models of several sizes per task (--elastic-variants): its operator adds a task with "
            "'isthmus elastic variants'"
        )

    def remove(self, name: str) -> None:
        """Raises InvalidInput: see ``register``."""
        raise InvalidInput("the tasks of this server are those of its folder of variants (--elastic-variants)")


def open_variants(settings: ElasticSettings) -> Elastic:
    """Opens everything except the threads. It loads every model once, and keeps those that fit into memory.

    Raises InvalidInput, with the way out, if the folder, the memory or other options do not go together.
    """
    assert settings.variants is not None, "checked by the caller"
    try:
        memory_bytes = memory_named(settings.policy)
    except ValueError as error:
        raise InvalidInput(f"--elastic-policy: {error}") from error
    if memory_bytes is None:
        raise InvalidInput(
            f"--elastic-policy {settings.policy}: model variants are served by INFaaS: add --elastic-policy infaas:GB "
            "with the gigabytes for the models of each executor"
        )
    _check_options(settings)
    torch.set_num_threads(settings.threads)
    try:
        variants = Variants.read(settings.variants)
        largest = max(size.memory_bytes for size in variants.sizes)
        if largest > memory_bytes:
            raise InvalidInput(
                f"--elastic-policy {settings.policy}: {memory_bytes / 1e9:g} GB are too little: the largest model "
                f"takes {largest / 1e9:.3g} GB"
            )
        device = _device(settings, variants)
        files = _Files(variants, device)
        tasks = files.checked()
        memories = [
            Memory(variants.sizes, tuple(variants.tasks), memory_bytes, files.open) for _ in range(settings.executors)
        ]
    except (ValueError, RuntimeError) as error:
        raise InvalidInput(f"--elastic-variants: {error}") from error
    for line in variants.profile.key.differences(files.key):
        log.warning("the variants were measured on another machine (%s): make the folder again here", line)
    engine = Engine(
        variants.profile,
        Infaas(variants.sizes),
        max_waiting=settings.max_waiting,
        executors=settings.executors,
        adapts=False,  # the time of a batch contains that of loading its model
    )
    pool = Pool(memories)
    live = LiveEngine(engine, *pool.executors, on_start=lambda: torch.set_num_threads(settings.threads))
    pixels = files.pixels
    log.info(
        "INFaaS serves tasks %s in sizes %s, with %.3g GB for the models of each of %d executors",
        ", ".join(variants.tasks),
        ", ".join(SIZE_NAMES[size.level] for size in variants.sizes),
        memory_bytes / 1e9,
        settings.executors,
    )
    return Elastic(
        FolderTasks(tasks),
        live,
        Decoder(lambda data: decoded(data, pixels)),
        files.shape,
        variants=pool,
    )


class _Files:
    """Opens the models of a folder, as they were when the server started."""

    def __init__(self, variants: Variants, device: str) -> None:
        self._variants = variants
        self._device = device
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}
        self.key: MachineKey
        """What the variants would be measured with here."""
        self.pixels: PixelSpec
        """How all models read pictures."""
        self.shape: ModelShape
        """The shape of the base models."""

    def checked(self) -> list[Task]:
        """Loads every model once, and returns the tasks. Raises ValueError for a file that is not what it was."""
        variants = self._variants
        tasks = []
        for name, known in variants.tasks.items():
            for level, digest in known.hashes.items():
                ready = self._opened(name, level)
                key = machine_key(ready.runner)
                if key.model_hash != digest or classes_of(ready) != len(known.classes):
                    raise BadVariants(
                        f"{variants.file(name, level)} holds another model than when it was measured: add the task "
                        "again with 'isthmus elastic variants'"
                    )
                if ready.bytes > variants.size(level).memory_bytes:
                    raise BadVariants(f"{variants.file(name, level)} takes more memory than its description says")
                self._seen[name, level] = _state(variants.file(name, level))
                if level == 0:
                    self.key = replace(key, model_hash=variants.profile.key.model_hash)
                    self.pixels, self.shape = ready.runner.pixels, ready.runner.model.shape
                    tasks.append(Task(variants.spec(name), _head(ready)))
        return tasks

    def open(self, task: str, level: int) -> Ready:
        """Loads a model. Raises ValueError if its file changed since the server started."""
        file = self._variants.file(task, level)
        if _state(file) != self._seen[task, level]:
            raise BadVariants(f"{file} changed since the server started: restart the server")
        return self._opened(task, level)

    def _opened(self, task: str, level: int) -> Ready:
        variants = self._variants
        number_type = named(variants.profile.key.number_type)
        assert number_type is not None, "a profile names one"
        file = variants.file(task, level)
        return opened(file, pixels=variants.pixels, device=self._device, number_type=number_type)


def _state(file: Path) -> tuple[int, int]:
    """Returns what changes when a file is replaced. Raises BadVariants if there is none."""
    try:
        found = file.stat()
    except OSError as error:
        raise BadVariants(f"{file}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def _head(ready: Ready) -> TaskWeights:
    def plain(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return tensor.detach().float().cpu().numpy().copy()

    return TaskWeights(plain(ready.task.head_weight_CD), plain(ready.task.head_bias_C), {})


def _device(settings: ElasticSettings, variants: Variants) -> str:
    if settings.device != "auto":
        return settings.device
    return "cpu" if variants.profile.key.device == "cpu" or not torch.cuda.is_available() else "cuda"


def _check_options(settings: ElasticSettings) -> None:
    """Raises InvalidInput for options of elastic serving that variants cannot have."""
    others = {
        "--elastic-profile": settings.profile is not None,
        "--elastic-measure": settings.measure,
        "--elastic-pixels": settings.pixels is not None,
        "--elastic-number-type": settings.number_type != "auto",
        "--elastic-compiler": settings.compiler is not None,
        "--elastic-memory-bytes": settings.memory_bytes is not None,
        "--elastic-warm": settings.warm is not None,
        "--elastic-expert-bytes": settings.expert_bytes is not None,
        "--elastic-most-executors": settings.most_executors is not None,
        "--executor": settings.executor != "thread",
    }
    given = [option for option, is_given in others.items() if is_given]
    if given:
        raise InvalidInput(
            f"{', '.join(given)}: the folder of --elastic-variants says how its models run, and they run in threads of "
            "the server; leave it out"
        )
