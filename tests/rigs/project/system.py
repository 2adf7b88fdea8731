"""What the tests need beside Python's packages: ``make system`` installs it."""

import os
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip the test because something beside the project is missing; fail it if ISTHMUS_REQUIRE_SYSTEM is set."""
    if os.environ.get("ISTHMUS_REQUIRE_SYSTEM", "0") not in ("", "0"):
        pytest.fail(f"{reason} (ISTHMUS_REQUIRE_SYSTEM is set)")
    pytest.skip(reason)
