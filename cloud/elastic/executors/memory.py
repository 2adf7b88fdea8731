"""Memory that the server and one process of an executor share: a task's weights, or a batch's pixels and its logits.

It is anonymous (memfd_create) and sealed in its size. It has no name in /dev/shm, so the kernel frees it when both
processes have ended, however they end, and neither can make it smaller under the other. Pages that no batch has
touched take no memory.
"""

import fcntl
import math
import mmap
import os
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from isthmus.cloud.elastic.scheduling.profile import MAX_BATCH
from isthmus.cloud.elastic.tasks.task import FloatArray
from isthmus.proto.limits import MAX_CLASSES, MAX_TASK_WEIGHTS_BYTES

PixelType = Literal["uint8", "float32"]
ANSWERS_BYTES: Final = 4 * MAX_BATCH * MAX_CLASSES


class TooManyBytes(ValueError):
    """A batch or a task that does not fit into the memory."""


@dataclass(frozen=True)
class BatchMemory:
    """Room for one batch of up to ``MAX_BATCH`` images of ``image_px`` pixels a side, at ``fd``."""

    fd: int
    image_px: int
    map: mmap.mmap

    @staticmethod
    def create(image_px: int) -> "BatchMemory":
        """Makes the memory. Whoever inherits ``fd`` calls ``inherited``. Raises OSError."""
        fd = os.memfd_create("isthmus-batch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _size(image_px))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            return BatchMemory.inherited(fd, image_px)
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def inherited(fd: int, image_px: int) -> "BatchMemory":
        """Maps the memory of another process, which passed ``fd`` on."""
        return BatchMemory(fd, image_px, mmap.mmap(fd, _size(image_px)))

    def pixels(self, shape: tuple[int, ...], dtype: PixelType) -> npt.NDArray[Any]:
        """Returns the place of a batch's images. Raises TooManyBytes."""
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if min(shape, default=0) < 0 or size_bytes > _input_bytes(self.image_px):
            raise TooManyBytes(f"a batch of {shape} {dtype} is larger than {MAX_BATCH} images")
        return np.ndarray(shape, dtype, self.map)

    def weights(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Returns the place of a task's weights, a safetensors file. It is that of the images. Raises TooManyBytes."""
        if not 0 <= size_bytes <= MAX_TASK_WEIGHTS_BYTES:
            raise TooManyBytes(f"weights of {size_bytes} bytes are more than {MAX_TASK_WEIGHTS_BYTES}")
        return np.ndarray((size_bytes,), np.uint8, self.map)

    def answers(self, count: int) -> FloatArray:
        """Returns the place of all logits of a batch, ``count`` in all. Raises TooManyBytes."""
        if not 0 <= 4 * count <= ANSWERS_BYTES:
            raise TooManyBytes(f"{count} logits are more than {MAX_BATCH} images with {MAX_CLASSES} classes")
        return np.ndarray((count,), np.float32, self.map, _input_bytes(self.image_px))

    def close(self) -> None:
        """Closes the file descriptor. The mapping ends with its last array."""
        os.close(self.fd)


def _input_bytes(image_px: int) -> int:
    return max(4 * MAX_BATCH * 3 * image_px**2, MAX_TASK_WEIGHTS_BYTES)


def _size(image_px: int) -> int:
    return _input_bytes(image_px) + ANSWERS_BYTES
