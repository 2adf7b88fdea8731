"""The file of a search for schedules: what was tried, and the best for each gamma; a search goes on from it."""

import json
from pathlib import Path
from typing import Any

from isthmus.data.files import write_atomically


def read_search(path: Path, key: list[Any]) -> dict[str, Any]:
    """What an earlier search in this file tried. Raises ValueError where the file is of another search."""
    if not path.exists():
        return {"key": key, "tried": {}, "schedules": {}}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state, dict) and state["key"] == key and {"tried", "schedules"} <= set(state):
            return state
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError):
        pass
    raise ValueError(f"{path.name} is of another search, or damaged: remove it to begin anew, or name another file")


def write_search(path: Path, state: dict[str, Any]) -> None:
    """Writes the schedule to ``path``. Raises DiskFull."""
    write_atomically(path, json.dumps(state, indent=1))


def read_schedules(path: Path | None) -> dict[int, tuple[int, ...]]:
    """The best schedule of each gamma; none without a file. Raises ValueError for a file that holds none."""
    if path is None:
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["schedules"]
        return {int(gamma): tuple(map(int, schedule)) for gamma, schedule in raw.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} holds no schedules: {error}") from error
