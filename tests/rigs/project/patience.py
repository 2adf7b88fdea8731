"""Waiting in tests: for something to become true, never for a moment, and as long as any machine may need."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

HANGS_S: Final = 600.0
"""Only what hangs takes so long, also beside ten other busy processes. It is below the limit of a whole test."""
_LOOK_S: Final = 0.01


def until(holds: Callable[[], object], what: str = "") -> None:
    """Block until ``holds`` returns something true. Fails the test after ``HANGS_S``, naming ``what``."""
    ends_s = time.monotonic() + HANGS_S
    while not holds():
        assert time.monotonic() < ends_s, what
        time.sleep(_LOOK_S)


async def reached(holds: Callable[[], object], what: str = "") -> None:
    """Wait until ``holds`` returns something true, while the event loop goes on. Fails like ``until``."""
    ends_s = time.monotonic() + HANGS_S
    while not holds():
        assert time.monotonic() < ends_s, what
        await asyncio.sleep(_LOOK_S)
