"""The device writes files through data/files.py alone, which knows how a file survives a power loss."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3] / "edge"

ALLOWED = {
    "agent/device_state.py": {"open a+"},  # the process id in the lock
    "student/staging.py": {"open r+b", "open wb"},  # a download, synced before it gets its name
}
"""Each writes bytes that are of no use until they are complete, or that nothing reads after a restart."""


def writes(tree: ast.AST) -> set[str]:
    """Return what writes to files or renames them past data/files.py."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, node.func.value
        if name in ("write_text", "write_bytes", "touch", "symlink_to"):
            found.add(name)
        if name in ("replace", "rename", "renames") and isinstance(owner, ast.Name) and owner.id == "os":
            found.add(f"os.{name}")
        if name == "open":
            texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwab+x") and text]
            found |= {f"open {mode}" for mode in modes if set(mode) & set("wa+x")}
    return found


def test_only_data_files_writes() -> None:
    past = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        found = writes(ast.parse(path.read_text())) - ALLOWED.get(name, set())
        if found:
            past[name] = found
    assert not past, "use write_atomically, move, link and remove of data/files.py"


def test_the_check_sees_what_it_is_for() -> None:
    for line in ("path.write_text('x')", "os.replace(a, b)", "path.open('wb')", "os.rename(a, b)"):
        assert writes(ast.parse(line)), line
    assert not writes(ast.parse("path.open('rb'); text.replace('a', 'b')"))
