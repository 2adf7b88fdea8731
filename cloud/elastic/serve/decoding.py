"""Decodes image files in a bounded pool of threads, so that neither the event loop nor the engine decodes."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from isthmus.cloud.elastic.model.executor import Image
from isthmus.data.images import ImageError, PixelSpec, decode_image
from isthmus.proto.errors import Busy, InvalidInput, TooLate

MAX_PENDING: Final = 1_024
MAX_PENDING_BYTES: Final = 64 << 20


class Decoder:
    """Decodes files with ``decode``, which raises InvalidInput or TooLarge. It belongs to one event loop."""

    def __init__(
        self,
        decode: Callable[[bytes], Image],
        *,
        threads: int = 1,
        max_pending: int = MAX_PENDING,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decode = decode
        self._max_pending = max_pending
        self._max_pending_bytes = max_pending_bytes
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="elastic-decode")
        self.pending = 0
        self.pending_bytes = 0

    async def image(self, data: bytes, deadline_s: float) -> Image:
        """Returns the pixels of a JPEG or PNG file.

        Raises what ``decode`` raises, Busy if too many files or bytes are waiting, and TooLate if the file's turn comes
        after ``deadline_s``.
        """
        if self.pending >= self._max_pending or self.pending_bytes + len(data) > self._max_pending_bytes:
            raise Busy("too many images are waiting to be decoded; try again later")
        self.pending += 1
        self.pending_bytes += len(data)
        loop = asyncio.get_running_loop()
        image: asyncio.Future[Image] = loop.create_future()
        job = self._pool.submit(self._in_time, data, deadline_s)

        def ended(job: Future[Image]) -> None:
            # The room is free only after the work has ended, not when its caller leaves.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._ended, len(data), job, image)

        job.add_done_callback(ended)
        try:
            return await image
        except asyncio.CancelledError:
            job.cancel()
            raise

    def close(self) -> None:
        """Stops the threads and drops files that no thread has started. Blocks."""
        self._pool.shutdown(cancel_futures=True)

    def _in_time(self, data: bytes, deadline_s: float) -> Image:
        if self._clock() >= deadline_s:
            raise TooLate("could not be answered within its latency, so it was not computed")
        return self._decode(data)

    def _ended(self, size_bytes: int, job: Future[Image], image: asyncio.Future[Image]) -> None:
        self.pending -= 1
        self.pending_bytes -= size_bytes
        if image.done():
            return
        if job.cancelled():
            image.cancel()
        elif (error := job.exception()) is not None:
            image.set_exception(error)
        else:
            image.set_result(job.result())


def decoded(data: bytes, pixels: PixelSpec) -> Image:
    """Returns a file's pixels as the model reads them. Raises InvalidInput for no picture, or too large a one."""
    try:
        return decode_image(data, pixels.size_px, pixels.crop)
    except ImageError as error:
        raise InvalidInput(f"image: {error}") from error
