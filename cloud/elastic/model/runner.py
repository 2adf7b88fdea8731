"""Runs batches of mixed tasks on a device: in a number type, eagerly or compiled, as CUDA graphs on a GPU.

Samples whose tasks use the same prompt mode (append, replace, or none at this gamma) run together, each with its own
task's prompts. Then the head of each task reads its own samples.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from isthmus.cloud.elastic.experts.layer import Routing
from isthmus.cloud.elastic.experts.shelf import Shelf
from isthmus.cloud.elastic.model.attention import Mixing, fastest_mixing
from isthmus.cloud.elastic.model.int8 import Int8Linear
from isthmus.cloud.elastic.model.packed import PackedLinear
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.scheduling.levels import fewer_of, gamma_of
from isthmus.cloud.elastic.tasks.router import TaskRouter
from isthmus.cloud.elastic.tasks.task import FloatArray, PromptMode, TaskWeights
from isthmus.data.images import PixelSpec

NumberType = Literal["float32", "bfloat16", "int8"]
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}
"""The type of images, prompts and heads. int8 applies only to the linear layers of the blocks."""
BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024)
"""Batch sizes that code is compiled and graphs are captured for. A batch is filled up to the next of them."""

MAX_COMPILED: Final = 4_096

Prompts = tuple[Tensor | None, Tensor | None]
"""Prompts to append (B, L, G, D) and to replace (B, L, 2, H, G, d); at most one of them is given."""


@dataclass(frozen=True, eq=False)
class ServedRouter:
    """A task's router on the device, in float32: (M, D, E) and (M, E), minus infinity outside of its window."""

    weight_MDE: Tensor
    bias_ME: Tensor


@dataclass(frozen=True, eq=False)
class ServedTask:
    """A task's weights on the device. ``prompts[gamma]`` is (L, G, D) to append, (L, 2, H, G, d) to replace.

    ``router`` is there if the model has experts.
    """

    head_weight_CD: Tensor
    head_bias_C: Tensor
    mode: PromptMode
    prompts: Mapping[int, Tensor]
    router: ServedRouter | None = None

    def group(self, gamma: int) -> PromptMode | None:
        """Returns how the task prompts at ``gamma``; None: it does not."""
        return self.mode if gamma in self.prompts else None


def runs_onednn(device: str, compiler: str | None) -> bool:
    """Returns True if a runner with these options can use oneDNN's int8 and packed layers."""
    return torch.device(device).type == "cpu" and compiler is None and torch.backends.mkldnn.is_available()


class ElasticRunner:
    """Runs the model. It moves and converts ``model`` in place. Only one thread at a time may call ``answer``.

    ``compiler`` names a backend of torch.compile ("inductor"). It compiles code for each (gamma, bucket) at its first
    batch, which takes up to a minute. On a GPU each of them is captured as a CUDA graph, unless ``graphs`` is False.
    With ``packed``, float32 and bfloat16 weights are also kept in packed form on processors, which doubles their memory
    (packed.py); the weights must not change afterwards. In bfloat16 the faster way of attention is measured as well
    (attention.py), unless ``mixing`` names it. A model with experts takes levels in the place of gammas
    (scheduling/levels.py). It skips experts whose weight is under ``least_weight``. It runs eagerly, since the sizes of
    its products depend on the pictures.

    Raises ValueError for int8 on a GPU or with a compiler, and for experts with a compiler.
    """

    def __init__(
        self,
        model: ElasticViT,
        pixels: PixelSpec,
        *,
        device: str = "cpu",
        number_type: NumberType = "float32",
        compiler: str | None = None,
        graphs: bool = True,
        packed: bool = False,
        mixing: Mixing | None = None,
        least_weight: float = 0.0,
    ):
        self.device = torch.device(device)
        self.number_type: NumberType = number_type
        self.dtype = DTYPES[number_type]
        if number_type == "int8" and not runs_onednn(device, compiler):
            raise ValueError("int8 runs only on a processor and without a compiler")
        if model.expert_layers and compiler is not None:
            raise ValueError("a model with experts does not run compiled: leave the compiler out")
        self.model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.model.place_experts(self.device, self.dtype)
        self._least_weight = least_weight
        if number_type == "int8":
            self.model.remake_linears(Int8Linear)
        elif packed and runs_onednn(device, compiler):
            self.model.remake_linears(PackedLinear)
            if number_type == "bfloat16":
                self.model.mixing = mixing or fastest_mixing(
                    model.heads, model.width // model.heads, model.tokens, self.dtype
                )
        self.pixels = pixels
        deviation_C = torch.tensor(pixels.deviation, device=self.device)
        self._scale_C = 1 / (255 * deviation_C)
        self._offset_C = torch.tensor(pixels.mean, device=self.device) / deviation_C
        self._compiler = compiler
        self._graphs = graphs and self.device.type == "cuda" and not model.expert_layers
        self._ready: dict[tuple[int, int, PromptMode | None], Callable[[Tensor, Prompts], Tensor]] = {}

    def prepare(self, weights: TaskWeights, mode: PromptMode = "append") -> ServedTask:
        """Places a task's weights on the device. Raises ValueError if its shapes do not fit the model."""
        prompts = {}
        for gamma, array_LGD in weights.prompts_LGD.items():
            if array_LGD.shape != (self.model.depth, gamma, self.model.width):
                raise ValueError(f"prompts of shape {array_LGD.shape} at gamma {gamma} do not fit the model")
            prompts_LGD = self._placed(array_LGD)
            with torch.inference_mode():
                prompts[gamma] = prompts_LGD if mode == "append" else self.model.prompt_keys_values(prompts_LGD)
        if weights.head_weight_CD.shape[1:] != (self.model.width,):
            raise ValueError(
                f"the head reads {weights.head_weight_CD.shape[1:]} features; the model has {self.model.width}"
            )
        router = self._router(weights.router)
        served = ServedTask(
            self._placed(weights.head_weight_CD), self._placed(weights.head_bias_C), mode, prompts, router
        )
        if weights.router is not None:
            self._announce(served, weights.router)
        return served

    @property
    def compiled(self) -> bool:
        """Whether the model runs as compiled code."""
        return self._compiler is not None

    def own_task(self) -> ServedTask:
        """Returns the model's own head as a task without prompts. Raises ValueError if it is not one linear layer."""
        head: Any = self.model.vit.head
        if not isinstance(head, torch.nn.Linear) or hasattr(self.model.vit, "head_dist"):
            raise ValueError("the model has no head of its own that a task could use")
        return ServedTask(head.weight, head.bias, "append", {})

    def plain(self) -> "ElasticRunner":
        """Returns a runner of the same model and device that runs eagerly."""
        return ElasticRunner(
            self.model, self.pixels, device=str(self.device), number_type=self.number_type, graphs=False
        )

    def images(self, pictures: npt.NDArray[Any] | Tensor) -> Tensor:
        """Returns standardised pictures (B, 3, H, W) on the device, in the runner's number type.

        ``pictures`` are uint8 (B, H, W, 3), or float (B, 3, H, W) if they are standardised already.
        """
        tensor = torch.as_tensor(pictures).to(self.device, non_blocking=True)
        if tensor.dtype == torch.uint8:
            tensor = (tensor * self._scale_C - self._offset_C).permute(0, 3, 1, 2)
        return tensor.to(self.dtype).contiguous()

    @torch.inference_mode()
    def answer(self, pictures: npt.NDArray[Any] | Tensor, gamma: int, tasks: Sequence[ServedTask]) -> list[FloatArray]:
        """Returns the logits (C,) of each picture for its own task.

        ``gamma`` is a level if the model has experts. A task without prompts for a gamma above 0 runs at gamma 0.
        Raises ValueError for pictures that do not fit the model, or if there is not one task per picture.
        """
        if len(tasks) != len(pictures):
            raise ValueError(f"{len(pictures)} pictures and {len(tasks)} tasks")
        images_BCHW = self.images(pictures)
        k, gamma = self.k_of(gamma), gamma_of(gamma) if self.model.expert_layers else gamma
        answers: list[FloatArray | None] = [None] * len(tasks)
        for group in dict.fromkeys(task.group(gamma) for task in tasks):
            members = [index for index, task in enumerate(tasks) if task.group(gamma) == group]
            chosen_BCHW = images_BCHW if len(members) == len(tasks) else images_BCHW[members]
            prompts = _gathered([tasks[index] for index in members], gamma) if group else None
            routing = self.routing([tasks[index] for index in members], k)
            features_BD = self.features(chosen_BCHW, gamma if group else min(gamma, 0), prompts, group, routing)
            for task in dict.fromkeys(tasks[index] for index in members):
                rows = [row for row, index in enumerate(members) if tasks[index] is task]
                logits_BC = functional.linear(features_BD[rows], task.head_weight_CD, task.head_bias_C)
                for row, logits_C in zip(rows, logits_BC.float().cpu().numpy(), strict=True):
                    answers[members[row]] = logits_C
        return [logits_C for logits_C in answers if logits_C is not None]

    @torch.inference_mode()
    def features(
        self,
        images_BCHW: Tensor,
        gamma: int,
        prompts: Tensor | None = None,
        mode: PromptMode | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Returns the features (B, D) of standardised images on the device.

        ``prompts`` have the form of ``mode``, with a batch size of 1 or B. ``routing`` is needed if the model has
        experts.
        """
        given: Prompts = (prompts, None) if mode == "append" else (None, prompts)
        batch = len(images_BCHW)
        if not (self._compiler or self._graphs):
            return self.model.features(images_BCHW, gamma, *given, routing=routing)
        bucket = next((size for size in BUCKETS if size >= batch), batch)
        if bucket != batch:
            images_BCHW = _filled(images_BCHW, bucket)
        if prompts is not None:
            prompts = prompts.expand(batch, *prompts.shape[1:]) if len(prompts) == 1 else prompts
            prompts = _filled(prompts, bucket)
            given = (prompts, None) if mode == "append" else (None, prompts)
        key = (gamma, bucket, mode if prompts is not None else None)
        if key not in self._ready:
            self._ready[key] = self._made(gamma, images_BCHW, given)
        return self._ready[key](images_BCHW, given)[:batch]

    def _made(self, gamma: int, images_BCHW: Tensor, given: Prompts) -> Callable[[Tensor, Prompts], Tensor]:
        """Makes the function that runs this gamma with these shapes."""

        def plain(images_BCHW: Tensor, prompts: Prompts) -> Tensor:
            return self.model.features(images_BCHW, gamma, *prompts)

        run = plain
        if self._compiler:
            limits = torch._dynamo.config  # each gamma and bucket is one more compilation of the same function
            limits.recompile_limit = max(limits.recompile_limit, MAX_COMPILED)
            limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MAX_COMPILED)
            run = torch.compile(plain, dynamic=False, fullgraph=True, backend=self._compiler)
        return _captured(run, images_BCHW, given) if self._graphs else run

    def k_of(self, level: int) -> int:
        """Returns how many experts a token uses at a level; 0 if the model has none.

        Raises ValueError for a level that leaves none.
        """
        k = self.model.experts.k - fewer_of(level) if self.model.expert_layers else 0
        if k < 1 and self.model.expert_layers:
            raise ValueError(f"level {level} leaves no expert: this model uses {self.model.experts.k}")
        return k

    def _router(self, router: TaskRouter | None) -> ServedRouter | None:
        """Places a router. Raises ValueError if the model has experts and there is none, or it does not fit."""
        shape, width = self.model.experts, self.model.width
        if not self.model.expert_layers:
            return None
        if router is None:
            raise ValueError("the task has no router, and the model has experts: 'isthmus elastic experts' makes both")
        if router.weight_MDE.shape != (shape.layers, width, shape.experts):
            raise ValueError(f"a router of shape {router.weight_MDE.shape} does not fit the model's {shape}")
        bias_ME = np.full((shape.layers, shape.experts), -np.inf, np.float32)
        window = slice(router.first, router.first + router.count)
        bias_ME[:, window] = router.bias_ME[:, window]
        return ServedRouter(
            torch.from_numpy(np.ascontiguousarray(router.weight_MDE)).to(self.device),
            torch.from_numpy(bias_ME).to(self.device),
        )

    def _announce(self, served: ServedTask, router: TaskRouter) -> None:
        """Has the experts of a task loaded ahead, and let go when the task is gone, if they are kept in files."""
        window = range(router.first, router.first + router.count)
        keys = [(layer, expert) for layer in range(self.model.experts.layers) for expert in window]
        for shelf in dict.fromkeys(
            each.experts for each in self.model.expert_layers if isinstance(each.experts, Shelf)
        ):
            shelf.announce(keys)
            weakref.finalize(served, shelf.release, keys)

    def routing(self, tasks: Sequence[ServedTask], k: int) -> Routing | None:
        """Returns the routers of a batch; None if the model has no experts."""
        if not self.model.expert_layers:
            return None
        distinct = list(dict.fromkeys(tasks))
        routers = [task.router for task in distinct if task.router is not None]
        positions = {task: place for place, task in enumerate(distinct)}
        tasks_B = None if len(distinct) == 1 else torch.tensor([positions[task] for task in tasks], device=self.device)
        return Routing(
            torch.stack([router.weight_MDE for router in routers]),
            torch.stack([router.bias_ME for router in routers]),
            k,
            tasks_B,
            self._least_weight,
        )

    def _placed(self, array: FloatArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)


def _gathered(tasks: Sequence[ServedTask], gamma: int) -> Tensor:
    """Returns the prompts of each sample's task. If all samples have one task, the batch size is 1."""
    distinct = list(dict.fromkeys(tasks))
    stacked = torch.stack([task.prompts[gamma] for task in distinct])
    if len(distinct) == 1:
        return stacked
    positions = {task: index for index, task in enumerate(distinct)}
    return stacked[[positions[task] for task in tasks]]


def _filled(samples: Tensor, size: int) -> Tensor:
    """Fills the batch up to ``size`` with copies of the last sample."""
    missing = size - len(samples)
    return torch.cat((samples, samples[-1:].expand(missing, *samples.shape[1:]))) if missing else samples.contiguous()


def _captured(
    run: Callable[[Tensor, Prompts], Tensor], images_BCHW: Tensor, given: Prompts
) -> Callable[[Tensor, Prompts], Tensor]:
    """Captures ``run`` as a CUDA graph. Each call of the result copies its arguments into the graph's own inputs."""
    images, prompts = images_BCHW.clone(), tuple(None if each is None else each.clone() for each in given)
    held: Prompts = (prompts[0], prompts[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries must choose their kernels before the capture
            run(images, held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(images, held)

    def replay(images_BCHW: Tensor, given: Prompts) -> Tensor:
        images.copy_(images_BCHW)
        for mine, theirs in zip(held, given, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        graph.replay()
        return out.clone()

    return replay
