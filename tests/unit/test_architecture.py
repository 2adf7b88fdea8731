"""docs/architecture.md names every module, and no module that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("proto", "data", "edge", "distill", "cloud", "isthmus")


def test_every_module_has_its_line() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = re.split(r"^### `(\w+)/`.*$", page, flags=re.MULTILINE)
    told = {
        f"{room}/{name}"
        for room, text in zip(parts[1::2], parts[2::2], strict=True)
        for name in re.findall(r"^\| `([\w/]+\.py)` \| \S", text, flags=re.MULTILINE)
    }
    there = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py" and "_pb2" not in path.name and "migrations" not in path.parts
    }
    assert told == there
