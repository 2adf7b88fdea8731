"""ElasticService on the wire: a task arrives in chunks, an image in one call."""

import asyncio
import hashlib
import logging
import tempfile
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from isthmus.cloud.elastic.model.executor import Image
from isthmus.cloud.elastic.serve.serving import Elastic, Terms
from isthmus.cloud.elastic.tasks.task import DEFAULT_LATENCY_S, DEFAULT_UTILITY, PromptMode, Task, TaskSpec
from isthmus.cloud.rpc.scopes import tenant
from isthmus.cloud.rpc.task_messages import spec_to_pb
from isthmus.cloud.store.tenants import OverQuota
from isthmus.cloud.tenants import names
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.checks import identifier
from isthmus.proto.errors import Busy, Corrupt, InvalidInput, OutOfOrder, TooLarge, TooLate
from isthmus.proto.limits import CHUNK_BYTES, MAX_TASK_WEIGHTS_BYTES
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

_MODES: Final[dict[int, PromptMode]] = {
    pb.PROMPT_MODE_UNSPECIFIED: "append",
    pb.PROMPT_MODE_APPEND: "append",
    pb.PROMPT_MODE_REPLACE: "replace",
}
_REGISTRATIONS: Final = 2
"""Registrations at a time. Each may hold a whole task in memory."""


@dataclass(frozen=True)
class ElasticServicer(pb_grpc.ElasticServiceServicer):
    """Maps ElasticService to elastic serving.

    ``scratch``: folder for weights while they are uploaded. An upload that exceeds ``upload_timeout_s`` is aborted, so
    that a stalled client does not prevent others from registering.
    """

    elastic: Elastic
    scratch: Path
    roster: Roster
    upload_timeout_s: float = 120.0
    _registering: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_REGISTRATIONS))

    async def RegisterTask(
        self, requests: AsyncIterator[pb.RegisterTaskRequest], context: Any
    ) -> pb.RegisterTaskResponse:
        if self._registering.locked():
            raise Busy(f"{_REGISTRATIONS} tasks are being registered; try again later", retry_after_s=5.0)
        async with self._registering:
            await asyncio.to_thread(self.scratch.mkdir, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.scratch, suffix=".part") as file:
                try:
                    async with asyncio.timeout(self.upload_timeout_s):
                        opening = await _opening(requests)
                        spec = spec_from_pb(opening.task)
                        await _receive(requests, opening, file)
                except TimeoutError as error:
                    raise TooLate(f"the task did not arrive within {self.upload_timeout_s:g} s") from error
                try:
                    task = await asyncio.to_thread(
                        self.elastic.registry.register,
                        spec,
                        Path(file.name),
                        time.time(),
                        owner=names.owner(tenant()),
                        at_most_of_owner=self.roster.quotas(tenant()).most_tasks,
                    )
                except OverQuota:
                    self.roster.refuse(tenant(), "tasks")
                    raise
        log.info("task %s is registered, version %d", task.name, task.version)
        return pb.RegisterTaskResponse(task=task_to_pb(task))

    async def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        mine = [each for each in self.elastic.registry.listing() if names.outside(tenant(), each.name) is not None]
        return pb.ListTasksResponse(tasks=[task_to_pb(task) for task in mine], image_px=self.elastic.model.image_px)

    async def RemoveTask(self, request: pb.RemoveTaskRequest, context: Any) -> pb.RemoveTaskResponse:
        name = names.inside(tenant(), identifier("task", request.name))
        await asyncio.to_thread(self.elastic.registry.remove, name)
        log.info("task %s is removed", name)
        return pb.RemoveTaskResponse()

    async def MakeQuery(self, request: pb.MakeQueryRequest, context: Any) -> pb.MakeQueryResponse:
        task = self.elastic.registry.get(names.inside(tenant(), request.task))
        terms = Terms(
            # In proto3 0 means absent. NaN is not 0 and is refused later.
            latency_s=request.latency_s if request.latency_s != 0 else None,
            utility=request.utility if request.HasField("utility") else None,
            remaining_s=context.time_remaining(),
            gamma=request.gamma if request.HasField("gamma") else None,
            min_accuracy=request.min_accuracy if request.HasField("min_accuracy") else None,
        )
        with self.elastic.room.of(request.ByteSize()):
            answer = await self.elastic.ask(task, _image(request), terms)
        best = int(answer.logits_C.argmax())
        return pb.MakeQueryResponse(
            class_index=best,
            class_name=answer.task.spec.classes[best],
            logits=answer.logits_C.tolist(),
            gamma=answer.gamma,
            queue_s=answer.queue_s,
            run_s=answer.run_s,
            in_time=answer.in_time,
            experts=answer.experts,
        )


def spec_from_pb(message: pb.TaskDescription) -> TaskSpec:
    """Convert a task's description from protobuf. Raises InvalidInput or TooLarge."""
    mode = _MODES.get(message.prompt_mode)
    if mode is None:
        raise InvalidInput("prompt mode: unknown; the other side is newer")
    return TaskSpec(
        name=identifier("task", message.name),
        classes=tuple(message.classes),
        prompt_mode=mode,
        accuracy=dict(message.accuracy),
        default_latency_s=message.default_latency_s or DEFAULT_LATENCY_S,
        default_utility=message.default_utility or DEFAULT_UTILITY,
    )


def task_to_pb(task: Task) -> pb.RegisteredTask:
    """Convert a registered task to protobuf."""
    found = task.spec.measured
    return pb.RegisteredTask(
        description=spec_to_pb(task.spec),
        version=task.version,
        prompted_gammas=task.prompted_gammas,
        measured=None
        if found is None
        else pb.MeasuredAccuracy(accuracy=dict(found.accuracy), pictures=found.pictures, used=found.credible),
    )


def _image(request: pb.MakeQueryRequest) -> bytes | Image:
    which = request.WhichOneof("image")
    if which == "encoded":
        return request.encoded
    if which != "pixels":
        raise InvalidInput("image: none was sent")
    pixels = request.pixels
    if min(pixels.height, pixels.width) < 1 or len(pixels.rgb) != pixels.height * pixels.width * 3:
        raise InvalidInput(f"image: {len(pixels.rgb)} bytes are not {pixels.height} x {pixels.width} x 3")
    return np.frombuffer(pixels.rgb, np.uint8).reshape(pixels.height, pixels.width, 3)


async def _opening(requests: AsyncIterator[pb.RegisterTaskRequest]) -> pb.RegisterTaskRequest.Opening:
    async for request in requests:
        if request.WhichOneof("part") == "opening":
            opening = request.opening
            if opening.weights_bytes > MAX_TASK_WEIGHTS_BYTES:
                raise TooLarge(f"weights: at most {MAX_TASK_WEIGHTS_BYTES} bytes are accepted")
            if opening.weights_bytes < 1 or len(opening.weights_sha256) != 32:
                raise InvalidInput("weights: their length and SHA-256 are required")
            return opening
        break
    raise OutOfOrder("the first message describes the task")


async def _receive(
    requests: AsyncIterator[pb.RegisterTaskRequest], opening: pb.RegisterTaskRequest.Opening, file: Any
) -> None:
    """Write the chunks to ``file``; check each chunk and the whole."""
    digest, received = hashlib.sha256(), 0
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise OutOfOrder("after the opening only chunks may follow")
        chunk = request.chunk
        if len(chunk.data) > CHUNK_BYTES or received + len(chunk.data) > opening.weights_bytes:
            raise TooLarge("weights: a chunk is too long, or there are more bytes than announced")
        if chunk.offset_bytes != received or not chunk.data:
            raise OutOfOrder(f"weights: the next chunk starts at {received} and is not empty")
        if zlib.crc32(chunk.data) != chunk.crc32:
            raise Corrupt(f"weights: the checksum at {received} does not match; send them again")
        received += len(chunk.data)
        digest.update(chunk.data)
        await asyncio.to_thread(file.write, chunk.data)
    if received != opening.weights_bytes or digest.digest() != opening.weights_sha256:
        raise Corrupt("weights: not what was announced (length or SHA-256 differs); send them again")
    await asyncio.to_thread(file.flush)
