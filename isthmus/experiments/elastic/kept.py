"""What an earlier run of an experiment has kept as files: its cells, and the order in which it merged tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from isthmus.cloud.elastic.scheduling.merge_order import ORDER_OF_OLD_FILES, MergeOrder, order_for, order_in
from isthmus.data.files import read_text, write_atomically

ORDER_FILE: Final = "merge-order.json"
_MERGED: Final = ("cells", "backbone-*", "tuning-*")
"""What a run leaves in its folder from the first merged token on: cells, and the models in training."""


def read_cell(path: Path, setup: Mapping[str, Any] | str, *, under: str = "setup") -> dict[str, Any]:
    """Return a kept cell without its setup, or its key, which the file has ``under`` a name of its own.

    Raises ValueError if it belongs to another setup.
    """
    cell: dict[str, Any] = json.loads(read_text(path))
    if cell.pop(under) != setup:
        raise ValueError(f"{path} belongs to a run with other options: name another folder with --out")
    return cell


def merge_order_in(out: Path, asked: MergeOrder | None) -> MergeOrder:
    """Return the order in which an experiment merges tokens in the folder ``out``, and note it there.

    A folder that an earlier run has begun keeps its order; one in which nothing was made takes any. Raises ValueError
    if another order is asked for, or if the note is damaged.
    """
    note, kept = out / ORDER_FILE, None
    if any(any(out.glob(pattern)) for pattern in _MERGED):
        kept = order_in(json.loads(read_text(note))) if note.is_file() else ORDER_OF_OLD_FILES
    order = order_for(asked, {str(out): kept})
    write_atomically(note, json.dumps({"merge_order": order}) + "\n")
    return order
