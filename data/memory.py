"""Memory that the C library keeps after it was freed, given back to the system, or not kept in the first place."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, Final

_MMAP_THRESHOLD: Final = -3
"""M_MMAP_THRESHOLD of malloc.h."""
_LARGE_BYTES: Final = 256 << 10


def give_back() -> None:
    """Return freed memory to the system. Only glibc can be asked to; elsewhere nothing happens.

    ONNX Runtime reads a model, fuses its layers and frees what it has read. Without this, glibc keeps 124 MB after the
    two encoders of preset ``small``, whose weights are 94 MB.
    """
    trim: Callable[[int], int] | None = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def keep_little() -> None:
    """Let every block of 256 KiB or more go back to the system when it is freed. Only glibc can be told to.

    It raises its own limit to the largest block that was freed, up to 32 MiB, and keeps smaller ones. The pictures of
    clips would be kept like this: 12 MB that nobody uses.
    """
    set_option: Callable[[int, int], int] | None = _of_glibc("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGE_BYTES)


@functools.cache
def _of_glibc(name: str) -> Any:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another C library may know the name and mean something else
        return getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
