"""inference.GRPCInferenceService on the wire: the Open Inference Protocol, version 2. Each task is a model."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from isthmus import __version__
from isthmus.cloud.elastic.serve.live import Answer
from isthmus.cloud.elastic.serve.serving import Elastic, Terms
from isthmus.cloud.elastic.tasks.task import Task
from isthmus.cloud.rpc.infer_tensors import (
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
from isthmus.cloud.rpc.scopes import for_caller
from isthmus.proto.errors import InvalidInput, NotYours
from isthmus.proto.limits import MAX_IMAGES_PER_REQUEST
from isthmus.proto.open_inference import inference_pb2 as pb
from isthmus.proto.open_inference import inference_pb2_grpc as pb_grpc

PLATFORM: Final = "isthmus_elastic_vit"
EXTENSIONS: Final = ("classification", "model_configuration", "statistics")
_STREAM_IN_FLIGHT: Final = 256
"""Requests of one stream that are answered at a time. Further requests stay with the client."""
_NUMBER: Final = re.compile(r"\s{0,8}[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?\s{0,8}", re.ASCII)
"""A number in a parameter of a string. Longer ones are refused."""
_IGNORED: Final = frozenset({"sequence_id", "sequence_start", "sequence_end", "priority", "binary_data_output"})


@dataclass(frozen=True)
class OpenInferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """Maps the Open Inference Protocol to elastic serving."""

    elastic: Elastic

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.elastic.live.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        try:
            self._task(request.name, request.version)
        except NotYours:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self.elastic.live.ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="isthmus", version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        task = self._task(request.name, request.version)
        inputs = [(name, *image_shape(name, self.elastic.model)) for name in (IMAGE, PIXELS, TENSOR)]
        outputs: list[tuple[str, str, tuple[int, ...]]]
        outputs = [(LOGITS, "FP32", (len(task.spec.classes),)), (LABEL, "BYTES", ())]
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=task.name,
            versions=[str(task.version)],
            platform=PLATFORM,
            inputs=[tensor(name=name, datatype=kind, shape=(-1, *rest)) for name, kind, rest in inputs],
            outputs=[tensor(name=name, datatype=kind, shape=(-1, *rest)) for name, kind, rest in outputs],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        task = self._task(request.name, request.version)
        side, scalar = self.elastic.model.image_px, [1]
        config = pb.ModelConfig(
            name=task.name, platform=PLATFORM, backend="isthmus", max_batch_size=MAX_IMAGES_PER_REQUEST
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

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        registry = self.elastic.registry
        tasks = [self._task(request.name, request.version)] if request.name else registry.listing()
        return pb.ModelStatisticsResponse(model_stats=[self._statistics(task) for task in tasks])

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                index(name=task.name, version=str(task.version), state="READY")
                for task in self.elastic.registry.listing()
            ]
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        return await self._infer(request, context.time_remaining(), of_call=True)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        room = asyncio.Semaphore(_STREAM_IN_FLIGHT)
        # Holds at most the semaphore's number of tasks, plus the end marker.
        replies: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None] = asyncio.Queue()
        under_way: set[asyncio.Task[pb.ModelStreamInferResponse]] = set()

        async def read() -> None:
            try:
                async for request in requests:
                    await room.acquire()
                    reply = asyncio.create_task(self.streamed(request, context.time_remaining()))
                    under_way.add(reply)
                    replies.put_nowait(reply)
            finally:
                replies.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (reply := await replies.get()) is not None:
                yield await reply
                under_way.discard(reply)
                room.release()
            await reader
        finally:
            for task in (reader, *under_way):
                task.cancel()
            await asyncio.gather(reader, *under_way, return_exceptions=True)

    async def streamed(self, request: pb.ModelInferRequest, remaining_s: float | None) -> pb.ModelStreamInferResponse:
        """Answer one request of a stream; an error becomes a response."""
        try:
            response = await self._infer(request, remaining_s, of_call=False)
        except Exception as error:
            refused = pb.ModelInferResponse(model_name=request.model_name[:64], id=request.id[:64])
            message = str(for_caller(error, "ModelStreamInfer"))
            return pb.ModelStreamInferResponse(error_message=message, infer_response=refused)
        return pb.ModelStreamInferResponse(infer_response=response)

    async def _infer(
        self, request: pb.ModelInferRequest, remaining_s: float | None, *, of_call: bool
    ) -> pb.ModelInferResponse:
        """Answer one request.

        ``of_call``: the remaining time belongs to this request alone, so it may serve as the requested latency.
        """
        task = self._task(request.model_name, request.model_version)
        terms = terms_of(request, task, remaining_s, of_call=of_call)
        wanted = wanted_outputs(request, task)
        answers: list[Answer]
        with self.elastic.room.of(request.ByteSize()):
            images = images_of(request, self.elastic.model)
            if len(images) == 1:
                answers = [await self.elastic.ask(task, images[0], terms)]
            else:
                answers = await _all([self.elastic.ask(task, image, terms) for image in images])
        response = pb.ModelInferResponse(model_name=task.name, model_version=str(task.version), id=request.id)
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

    def _task(self, name: str, version: str) -> Task:
        task = self.elastic.registry.get(name)
        if version not in ("", str(task.version)):
            raise NotYours(f"task {name!r} has only version {task.version}")
        return task

    def _statistics(self, task: Task) -> pb.ModelStatistics:
        known = self.elastic.live.statistics(task.name)
        found = pb.ModelStatistics(
            name=task.name,
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
    """Read the parameters ``latency_s``, ``utility`` and Triton's ``timeout`` (microseconds). Raises InvalidInput.

    A number may be written as a string: KServe's client sends strings, whole numbers and booleans only.
    """
    unknown = set(request.parameters) - {"latency_s", "utility", "timeout"} - _IGNORED
    if unknown:
        raise InvalidInput(
            f"unknown parameter {min(unknown)[:64]!r}; the known ones are 'latency_s', 'utility' and 'timeout'"
        )
    latency_s = number_of(request, "latency_s")
    timeout_us = number_of(request, "timeout")
    if latency_s is None and timeout_us is not None:
        latency_s = timeout_us / 1e6
    if latency_s is None and not of_call:
        latency_s = task.spec.default_latency_s
    return Terms(latency_s, number_of(request, "utility"), remaining_s)


def number_of(request: pb.ModelInferRequest, name: str) -> float | None:
    """Return a parameter as a number; None if it is not given. Raises InvalidInput."""
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


async def _all(asks: list[Any]) -> list[Answer]:
    """Return all answers, or raise the first error and drop the others."""
    tasks = [asyncio.ensure_future(ask) for ask in asks]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
