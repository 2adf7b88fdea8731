"""Cells of an experiment that an earlier run has kept as files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.data.files import read_text


def read_cell(path: Path, setup: Mapping[str, Any] | str, *, under: str = "setup") -> dict[str, Any]:
    """Return a kept cell without its setup, or its key, which the file has ``under`` a name of its own.

    Raises ValueError if it belongs to another setup.
    """
    cell: dict[str, Any] = json.loads(read_text(path))
    if cell.pop(under) != setup:
        raise ValueError(f"{path} belongs to a run with other options: name another folder with --out")
    return cell
