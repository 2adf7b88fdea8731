"""The file of a schedule search: what was tried, and the best schedule per gamma. A search resumes from it."""

import json
from pathlib import Path
from typing import Any

from isthmus.cloud.elastic.scheduling.merge_order import ORDER_OF_OLD_FILES, MergeOrder, order_in
from isthmus.data.files import write_atomically


def search_key(model_hash: str, pictures: dict[str, str], order: MergeOrder) -> list[Any]:
    """Returns what identifies a search. ``pictures``: the hash of each task's pictures."""
    named = [] if order == ORDER_OF_OLD_FILES else [order]  # files of before merging had an order name none
    return [model_hash, pictures, *named]


def order_of_search(path: Path | None) -> MergeOrder | None:
    """Returns the order in which the file's schedules were searched; None without a file, or if it is damaged."""
    if path is None or not path.exists():
        return None
    try:
        key = json.loads(path.read_text(encoding="utf-8")).get("key", [])
        return order_in({"merge_order": key[2]} if len(key) > 2 else {})
    except (ValueError, TypeError, AttributeError, KeyError):
        return None  # whoever reads the schedules says what is wrong with the file


def read_search(path: Path, key: list[Any]) -> dict[str, Any]:
    """Reads the state of an earlier search, or returns an empty one. Raises ValueError for another search's file."""
    if not path.exists():
        return {"key": key, "tried": {}, "schedules": {}}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state, dict) and state["key"] == key and {"tried", "schedules"} <= set(state):
            return state
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError):
        pass
    raise ValueError(
        f"{path.name} belongs to another search or is damaged: remove it to start again, or name another file"
    )


def write_search(path: Path, state: dict[str, Any]) -> None:
    """Writes the state of a search. Raises DiskFull."""
    write_atomically(path, json.dumps(state, indent=1))


def read_schedules(path: Path | None) -> dict[int, tuple[int, ...]]:
    """Reads the best schedule of each gamma; an empty dict without a file. Raises ValueError for a wrong file."""
    if path is None:
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["schedules"]
        return {int(gamma): tuple(map(int, schedule)) for gamma, schedule in raw.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is not a file of schedules: {error}") from error
