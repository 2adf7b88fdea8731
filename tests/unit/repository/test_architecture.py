"""docs/architecture.md lists every room with the first line of its docstring; no room is over-full."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("isthmus", "edge", "cloud", "distill", "data", "proto")
GENERATED = {"migrations", "v1", "open_inference"}
MOST_MODULES = 15


def rooms() -> list[Path]:
    found = (path.parent for room in ROOMS for path in sorted((ROOT / room).rglob("__init__.py")))
    return [folder for folder in found if not GENERATED & set(folder.relative_to(ROOT).parts)]


def purpose(folder: Path) -> str:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0].replace("``", "`")


def test_every_room_is_listed_with_its_purpose() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([\w/]+)/`\n  (.*)$", page, flags=re.MULTILINE)
    assert listed == [(folder.relative_to(ROOT).as_posix(), purpose(folder)) for folder in rooms()]


def test_every_room_has_a_purpose_and_few_modules() -> None:
    for folder in rooms():
        assert purpose(folder).endswith("."), folder
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{folder}: {len(modules)} modules"
