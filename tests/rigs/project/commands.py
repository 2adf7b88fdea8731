"""Runs ``isthmus`` commands in this process: a process of its own would import torch again for each of them."""

import contextlib
import io
from collections.abc import Sequence

from isthmus import cli


def ended(words: Sequence[object]) -> tuple[object, str]:
    """Run ``isthmus`` with these words. Return its exit code and what it printed, errors included."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        try:
            code: object = cli.main([str(word) for word in words])
        except SystemExit as leaving:
            code = leaving.code or 0
    return code, printed.getvalue()
