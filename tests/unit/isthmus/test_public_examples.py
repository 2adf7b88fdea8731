"""Each public name has an example in its docstring, and each example gives the documented result."""

import ast
import asyncio
import dataclasses
import doctest
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import isthmus
from isthmus.edge.agent.device_run import InferConfig
from isthmus.edge.capture.clip_plan import plan_clips
from isthmus.edge.link.over_grpc import open_channel
from tests.rigs.cloud.service import make_tiny_release
from tests.rigs.distill.release import tiny_recipe

ROOT = Path(isthmus.__file__).resolve().parents[1]
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def docstrings() -> dict[str, str]:
    """Return the docstring of each public name; for a constant, the literal after its assignment."""
    found: dict[str, str] = {}
    for node in ast.parse((ROOT / "isthmus" / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(f"isthmus.{node.module}")
            tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
            found |= {alias.name: docstring(tree, alias.name) for alias in node.names}
    return found


def docstring(tree: ast.Module, name: str) -> str:
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            literal = after.value if isinstance(after, ast.Expr) else None
            return str(literal.value) if isinstance(literal, ast.Constant) else ""
    raise AssertionError(f"the stub names a module that does not define {name}")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the names that examples may use beside the public ones (listed in docs/reference/api.md)."""
    folder = tmp_path_factory.mktemp("given")
    isthmus.make_crema_d(folder / "data", actors=3, takes=1, seed=0, difficulty=0.2, progress=False)
    make_tiny_release(folder / "release")
    plan = plan_clips(folder / "data", seed=1)
    listing = isthmus.read_listing(folder / "data")
    recipe = tiny_recipe(listing.classes)
    once = dataclasses.replace(recipe.all_distill, epochs=1)
    return {
        **{name: getattr(isthmus, name) for name in isthmus.__all__},
        "isthmus": isthmus,
        "asyncio": asyncio,
        "np": np,
        "torch": torch,
        "Path": Path,
        "CPU": torch.device("cpu"),
        "InferConfig": InferConfig,
        "open_channel": open_channel,
        "data": folder / "data",
        "listing": listing,
        "plan": plan,
        "link": isthmus.GrpcLink(open_channel("127.0.0.1:1")),
        "recipe": dataclasses.replace(
            recipe, teacher=dataclasses.replace(recipe.teacher, audio=once, visual=once, head=once)
        ),
        "release": isthmus.Release.open(folder / "release"),
    }


@pytest.mark.parametrize("name", isthmus.__all__)
def test_the_example_runs(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    text = docstrings()[name]
    examples = doctest.DocTestParser().get_doctest(text, {**given, "folder": tmp_path}, name, None, None)
    assert examples.examples, f"isthmus.{name} has no example in its docstring"
    said: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(examples, out=said.append)
    assert outcome.failed == 0, "".join(said)
