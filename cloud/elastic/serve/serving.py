"""Elastic serving for clients of any protocol. These are plain functions without grpc."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from isthmus.cloud import tracing
from isthmus.cloud.elastic.model.executor import Image
from isthmus.cloud.elastic.scheduling.query import MAX_LATENCY_S, MAX_UTILITY
from isthmus.cloud.elastic.serve.decoding import Decoder
from isthmus.cloud.elastic.serve.growth import Growth
from isthmus.cloud.elastic.serve.live import Answer, LiveEngine
from isthmus.cloud.elastic.tasks.task import ModelShape, Task, TaskSpec
from isthmus.proto.errors import Busy, InvalidInput, TooLate

if TYPE_CHECKING:
    # A server for devices alone does not need timm.
    from isthmus.cloud.elastic.serve.measuring import Measurer
    from isthmus.cloud.elastic.variants.pool import Pool
    from isthmus.cloud.elastic.warm.models import WarmModels

MAX_REQUEST_BYTES: Final = 512 << 20


@dataclass(frozen=True)
class Terms:
    """What a caller requests besides the answer. ``remaining_s`` is the time until the call's own deadline, if any.

    ``gamma`` fixes the gamma, and ``min_accuracy`` permits only gammas at which the task has at least this accuracy,
    as far as the server knows it.
    """

    latency_s: float | None = None
    utility: float | None = None
    remaining_s: float | None = None
    gamma: int | None = None
    min_accuracy: float | None = None

    def latency_for(self, task: Task) -> float:
        """Returns the seconds allowed from arrival to answer.

        It is the requested latency, else the time until the call's deadline, else the task's default. It never exceeds
        the call's deadline. Raises InvalidInput for an impossible latency, and TooLate if no time is left.
        """
        if self.latency_s is not None and not 0 < self.latency_s <= MAX_LATENCY_S:
            raise InvalidInput(f"latency must be above 0 and at most {MAX_LATENCY_S:g} s")
        if self.remaining_s is None:
            return task.spec.default_latency_s if self.latency_s is None else self.latency_s
        if self.remaining_s <= 0:
            raise TooLate("the deadline leaves no time to answer")
        return min(self.remaining_s, MAX_LATENCY_S if self.latency_s is None else self.latency_s)

    def utility_for(self, task: Task) -> float:
        """Returns the requested utility, else the task's default. Raises InvalidInput for an impossible utility."""
        utility = task.spec.default_utility if self.utility is None else self.utility
        if not 0 <= utility <= MAX_UTILITY:
            raise InvalidInput(f"utility must be from 0 to {MAX_UTILITY:g}")
        return utility


class Room:
    """Bounds the total bytes of all requests that are being answered. It belongs to one event loop."""

    def __init__(self, limit_bytes: int = MAX_REQUEST_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self.taken_bytes = 0

    @contextmanager
    def of(self, size_bytes: int) -> Iterator[None]:
        """Holds ``size_bytes`` for the duration of the block. Raises Busy if that exceeds the limit."""
        if self.taken_bytes + size_bytes > self._limit_bytes:
            raise Busy("too many bytes of images are waiting; try again later")
        self.taken_bytes += size_bytes
        try:
            yield
        finally:
            self.taken_bytes -= size_bytes


class KnownTasks(Protocol):
    """The tasks that a server answers: ``Registry``, or those of a folder of variants."""

    def get(self, name: str) -> Task:
        """Returns the task. Raises NotYours for a name that is not registered."""

    def listing(self) -> list[Task]:
        """Returns every served task, by name."""

    def register(
        self, spec: TaskSpec, weights: Path, now_s: float, *, owner: str = "", at_most_of_owner: int | None = None
    ) -> Task:
        """Adds a task, or replaces the owner's task of the same name. Raises IsthmusError."""

    def remove(self, name: str) -> None:
        """Removes the task. Raises IsthmusError."""


@dataclass(frozen=True)
class Elastic:
    """What the servicers call. Each of them holds ``room`` for a request from its receipt to its answer."""

    registry: KnownTasks
    live: LiveEngine
    decoder: Decoder
    model: ModelShape
    warm: "WarmModels | None" = None
    room: Room = field(default_factory=Room)
    measurer: "Measurer | None" = None
    growth: Growth | None = None
    variants: "Pool | None" = None
    clock: Callable[[], float] = time.monotonic

    def start(self) -> None:
        """Accepts queries from now on. Call it once, from the event loop that asks."""
        self.live.start()
        if self.growth is not None:
            self.growth.start()

    def stop(self) -> None:
        """Waits for the running batches, then refuses all waiting queries. It blocks: call it off the event loop."""
        if self.growth is not None:
            self.growth.stop()
        self.live.stop()

    async def ask(self, task: Task, image: bytes | Image, terms: Terms) -> Answer:
        """Returns the answer to one image: the bytes of a JPEG or PNG file, or an array (see ``executor.Image``).

        Raises InvalidInput, TooLarge, Busy, TooLate, Unavailable or Internal. A bad request is refused before any work.
        """
        arrival_s = self.clock()
        latency_s, utility = terms.latency_for(task), terms.utility_for(task)
        gammas = self.live.permitted(task, terms.gamma, terms.min_accuracy)
        if isinstance(image, bytes):
            try:
                image = await self.decoder.image(image, arrival_s + latency_s)
            except TooLate:
                self.live.count_evicted(task, arrival_s, utility, gammas)
                raise
        else:
            check_pixels(image, self.model.image_px)
        answer = await self.live.ask(
            task, image, arrival_s=arrival_s, latency_s=latency_s, utility=utility, gammas=gammas
        )
        ended_s, gamma, in_time = time.time(), answer.gamma, answer.in_time
        tracing.past("queue", answer.queue_s, ended_s=ended_s - answer.run_s, task=task.name)
        tracing.past("batch", answer.run_s, ended_s=ended_s, task=task.name, gamma=gamma, in_time=in_time)
        return answer


def check_pixels(image: Image, image_px: int) -> None:
    """Raises InvalidInput for an array that is not an image in the model's size, or that holds NaN or infinity."""
    if image.dtype == np.uint8 and image.shape == (image_px, image_px, 3):
        return
    if image.dtype != np.float32 or image.shape != (3, image_px, image_px):
        raise InvalidInput(f"image: must be {image_px} x {image_px} x 3 bytes, or 3 x {image_px} x {image_px} float32")
    # One pass: the sum of squares is finite unless an element is not finite or far beyond any pixel.
    if not math.isfinite(float(np.vdot(image, image))):
        raise InvalidInput("image: it holds NaN, infinity or numbers far beyond any pixel")
