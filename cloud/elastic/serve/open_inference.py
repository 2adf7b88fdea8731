"""The Open Inference Protocol, version 2, over any transport: each task is a model. Messages are protobuf's, no grpc.

``cloud/rpc`` serves these messages as they are, and ``cloud/http`` as JSON.
"""

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from isthmus import __version__
from isthmus.cloud.elastic.serve.infer_tensors import (
    IMAGE,
    LABEL,
    LOGITS,
    PIXELS,
    TENSOR,
    add_outputs,
    image_shape,
    images_of,
    wanted_outputs,
)
from isthmus.cloud.elastic.serve.live import Answer
from isthmus.cloud.elastic.serve.serving import Elastic, Terms
from isthmus.cloud.elastic.tasks.task import Task
from isthmus.cloud.store.tenants import DEFAULT
from isthmus.cloud.tenants import names
from isthmus.proto.errors import InvalidInput, NotYours
from isthmus.proto.limits import MAX_IMAGES_PER_REQUEST
from isthmus.proto.open_inference import inference_pb2 as pb

PLATFORM: Final = "isthmus_elastic_vit"
EXTENSIONS: Final = ("classification", "model_configuration", "statistics")
_NUMBER: Final = re.compile(r"\s{0,8}[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?\s{0,8}", re.ASCII)
"""A number in a parameter of a string. Longer ones are refused."""
_IGNORED: Final = frozenset({"sequence_id", "sequence_start", "sequence_end", "priority", "binary_data_output"})
_TERMS: Final = frozenset({"latency_s", "utility", "timeout", "gamma", "min_accuracy"})


def server_metadata() -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name="isthmus", version=__version__, extensions=EXTENSIONS)


@dataclass(frozen=True)
class OpenInference:
    """Maps the protocol's messages to elastic serving. An unknown model or version raises NotYours.

    ``tenant`` returns whose call it is; other tenants' models are not there. ``admit`` is called with the number of
    images that a request has beyond the one that its call counts as; it raises Busy if these are too many.
    """

    elastic: Elastic
    tenant: Callable[[], str] = lambda: DEFAULT
    admit: Callable[[int], None] = lambda images: None

    @property
    def ready(self) -> bool:
        """Whether queries are accepted."""
        return self.elastic.live.ready

    def model_ready(self, name: str, version: str) -> bool:
        """Returns whether the model is there and queries are accepted."""
        try:
            self.task(name, version)
        except NotYours:
            return False
        return self.ready

    def metadata(self, name: str, version: str) -> pb.ModelMetadataResponse:
        task = self.task(name, version)
        inputs = [(name, *image_shape(name, self.elastic.model)) for name in (IMAGE, PIXELS, TENSOR)]
        outputs: list[tuple[str, str, tuple[int, ...]]]
        outputs = [(LOGITS, "FP32", (len(task.spec.classes),)), (LABEL, "BYTES", ())]
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=task.spec.name,
            versions=[str(task.version)],
            platform=PLATFORM,
            inputs=[tensor(name=name, datatype=kind, shape=(-1, *rest)) for name, kind, rest in inputs],
            outputs=[tensor(name=name, datatype=kind, shape=(-1, *rest)) for name, kind, rest in outputs],
        )

    def config(self, name: str, version: str) -> pb.ModelConfigResponse:
        task = self.task(name, version)
        side, scalar = self.elastic.model.image_px, [1]
        config = pb.ModelConfig(
            name=task.spec.name, platform=PLATFORM, backend="isthmus", max_batch_size=MAX_IMAGES_PER_REQUEST
        )
        for name, kind, layout, dims in (
            (IMAGE, pb.TYPE_STRING, pb.ModelInput.FORMAT_NONE, scalar),
            (PIXELS, pb.TYPE_UINT8, pb.ModelInput.FORMAT_NHWC, [side, side, 3]),
            (TENSOR, pb.TYPE_FP32, pb.ModelInput.FORMAT_NCHW, [3, side, side]),
        ):
            config.input.add(name=name, data_type=kind, format=layout, dims=dims, optional=True)
        config.output.add(name=LOGITS, data_type=pb.TYPE_FP32, dims=[len(task.spec.classes)])
        config.output.add(name=LABEL, data_type=pb.TYPE_STRING, dims=scalar)
        for name, value in (
            ("gammas", ",".join(map(str, self.elastic.live.gammas))),
            ("prompted_gammas", ",".join(map(str, task.prompted_gammas))),
            ("default_latency_s", f"{task.spec.default_latency_s:g}"),
            ("default_utility", f"{task.spec.default_utility:g}"),
        ):
            config.parameters[name].string_value = value
        return pb.ModelConfigResponse(config=config)

    def statistics(self, name: str, version: str) -> pb.ModelStatisticsResponse:
        """Returns the statistics of one model, or of all if ``name`` is empty."""
        tasks = [self.task(name, version)] if name else self.tasks()
        return pb.ModelStatisticsResponse(model_stats=[self._statistics(task) for task in tasks])

    def index(self) -> pb.RepositoryIndexResponse:
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[index(name=task.spec.name, version=str(task.version), state="READY") for task in self.tasks()]
        )

    async def infer(
        self, request: pb.ModelInferRequest, remaining_s: float | None, *, of_call: bool
    ) -> pb.ModelInferResponse:
        """Answers one request. The outputs are raw contents.

        ``of_call``: the remaining time belongs to this request alone, so it may serve as the requested latency.
        Raises what ``Elastic.ask`` raises, and InvalidInput or TooLarge for a request that is not served.
        """
        task = self.task(request.model_name, request.model_version)
        terms = terms_of(request, task, remaining_s, of_call=of_call)
        wanted = wanted_outputs(request, task)
        answers: list[Answer]
        with self.elastic.room.of(request.ByteSize()):
            images = images_of(request, self.elastic.model)
            # The call itself was counted as one.
            if (further := len(images) - of_call) > 0:
                self.admit(further)
            if len(images) == 1:
                answers = [await self.elastic.ask(task, images[0], terms)]
            else:
                answers = await _all([self.elastic.ask(task, image, terms) for image in images])
        response = pb.ModelInferResponse(model_name=task.spec.name, model_version=str(task.version), id=request.id)
        experts = {answer.experts for answer in answers}
        if experts != {0}:
            response.parameters["experts"].int64_param = min(experts)
        gammas = [answer.gamma for answer in answers]
        if len(set(gammas)) == 1:
            response.parameters["gamma"].int64_param = gammas[0]
        else:
            response.parameters["gammas"].string_param = ",".join(map(str, gammas))
        # KServe's client drops numbers with fractions, so times are also given in whole microseconds.
        for name, seconds in (
            ("queue", max(answer.queue_s for answer in answers)),
            ("run", max(answer.run_s for answer in answers)),
        ):
            response.parameters[f"{name}_s"].double_param = seconds
            response.parameters[f"{name}_us"].int64_param = round(seconds * 1e6)
        response.parameters["in_time"].bool_param = all(answer.in_time for answer in answers)
        add_outputs(response, answers, wanted)
        return response

    def tasks(self) -> list[Task]:
        """Returns the tenant's tasks."""
        whose = self.tenant()
        return [each for each in self.elastic.registry.listing() if names.outside(whose, each.name) is not None]

    def task(self, name: str, version: str) -> Task:
        """Returns the task that the protocol calls a model. Raises NotYours."""
        task = self.elastic.registry.get(names.inside(self.tenant(), name))
        if version not in ("", str(task.version)):
            raise NotYours(f"task {name!r} has only version {task.version}")
        return task

    def _statistics(self, task: Task) -> pb.ModelStatistics:
        known = self.elastic.live.statistics(task.name)
        found = pb.ModelStatistics(
            name=task.spec.name,
            version=str(task.version),
            last_inference=int(known.last_unix_s * 1e3),
            inference_count=known.answered,
            execution_count=known.batches,
        )
        for into, count, seconds in (
            (found.inference_stats.success, known.answered, known.total_s),
            (found.inference_stats.fail, known.refused, known.refused_s),
            (found.inference_stats.queue, known.answered, known.queue_s),
            (found.inference_stats.compute_infer, known.answered, known.run_s),
        ):
            into.count, into.ns = count, int(seconds * 1e9)
        return found


def terms_of(request: pb.ModelInferRequest, task: Task, remaining_s: float | None, *, of_call: bool) -> Terms:
    """Reads ``latency_s``, ``utility``, ``gamma``, ``min_accuracy`` and Triton's ``timeout`` (microseconds).

    A number may be written as a string: KServe's client sends strings, whole numbers and booleans only.
    Raises InvalidInput.
    """
    unknown = set(request.parameters) - _TERMS - _IGNORED
    if unknown:
        *names, last = (repr(name) for name in sorted(_TERMS))
        raise InvalidInput(f"unknown parameter {min(unknown)[:64]!r}; the known ones are {', '.join(names)} and {last}")
    latency_s = number_of(request, "latency_s")
    timeout_us = number_of(request, "timeout")
    if latency_s is None and timeout_us is not None:
        latency_s = timeout_us / 1e6
    if latency_s is None and not of_call:
        latency_s = task.spec.default_latency_s
    gamma = number_of(request, "gamma")
    if gamma is not None and not gamma.is_integer():
        raise InvalidInput("parameter 'gamma': must be a whole number")
    return Terms(
        latency_s,
        number_of(request, "utility"),
        remaining_s,
        None if gamma is None else int(gamma),
        number_of(request, "min_accuracy"),
    )


def number_of(request: pb.ModelInferRequest, name: str) -> float | None:
    """Returns a parameter as a number; None if it is not given. Raises InvalidInput."""
    if name not in request.parameters:
        return None
    parameter = request.parameters[name]
    which = parameter.WhichOneof("parameter_choice")
    value = None if which in (None, "bool_param") else getattr(parameter, which)
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        value = None
    if value is None:
        raise InvalidInput(f"parameter '{name}': must be a number, or a string that is one, such as \"0.5\"")
    return float(value)


async def _all(asks: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Returns all answers, or raises the first error and drops the others."""
    tasks = [asyncio.ensure_future(ask) for ask in asks]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
