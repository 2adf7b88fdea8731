"""The public names: few, lazy, typed, each with an example that runs; and extensions of other packages."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import isthmus
from isthmus.cloud.elastic.policies.by_name import POLICIES, add_policy
from isthmus.distill.release import ReleaseError
from isthmus.distill.selection import STRATEGIES, add_strategy
from isthmus.extensions import load_extensions
from isthmus.proto.errors import InvalidInput
from tests.rigs.distill.release import tiny_recipe

STUB = Path(isthmus.__file__).with_suffix(".pyi")


def test_there_are_at_most_60_and_the_stub_lists_them() -> None:
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    (listed,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    assert sorted(listed) == sorted(isthmus.__all__)
    assert len(listed) <= 60


@pytest.mark.parametrize("name", isthmus.__all__)
def test_each_name_can_be_imported(name: str) -> None:
    assert getattr(isthmus, name) is not None
    assert name in dir(isthmus)


def test_importing_isthmus_imports_nothing_heavy() -> None:
    program = "import sys, isthmus; print(sorted({'torch', 'numpy', 'grpc', 'sklearn', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_gets_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError, match=r"no public name 'make_prototype'\. Did you mean 'isthmus\.make_proto"):
        _ = isthmus.make_prototype  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"'isthmus\.__all__' lists the public names"):
        _ = isthmus.zzz  # type: ignore[attr-defined]
    monkeypatch.setitem(isthmus._RENAMED, "old_name", "isthmus.new_name")
    with pytest.raises(AttributeError, match=r"isthmus\.old_name is now isthmus\.new_name"):
        _ = isthmus.old_name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("add", "known", "name"), [(add_strategy, STRATEGIES, "cosine"), (add_policy, POLICIES, "otas")]
)
def test_a_name_is_given_once(add: object, known: dict[str, object], name: str) -> None:
    assert callable(add)
    before = dict(known)
    with pytest.raises(ValueError, match="already"):
        add(name, lambda: None)
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        add("fixed:2", lambda: None)
    add(name, known[name])
    assert known == before


def installed(folder: Path, module: str) -> None:
    """Write a package with an extension, as pip would install it in ``folder``."""
    (folder / "others_extension.py").write_text(module)
    info = folder / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[isthmus.extensions]\nnearest = others_extension\n")


def test_an_extension_of_another_package_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "from isthmus import STRATEGIES, add_strategy\nadd_strategy('others', lambda *given: None)\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "nearest" in load_extensions()
        assert "nearest" in load_extensions()
        assert "others" in STRATEGIES
    finally:
        STRATEGIES.pop("others", None)
        sys.modules.pop("others_extension", None)


def test_a_broken_extension_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "raise RuntimeError('no such thing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("others_extension", None)
    with pytest.raises(InvalidInput, match=r"extension 'nearest' of the package 'others' cannot be imported: no such"):
        load_extensions()
    assert importlib.util.find_spec("others_extension") is not None


def test_a_release_may_name_the_strategy_of_an_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "from isthmus import STRATEGIES, add_strategy\nadd_strategy('others', STRATEGIES['random'])\n")
    recipe = tiny_recipe().to_json().replace('"strategy": "cosine"', '"strategy": "others"')
    (tmp_path / "recipe.json").write_text(recipe)
    with pytest.raises(ReleaseError, match="unknown strategy 'others'"):
        isthmus.Release.open(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("others_extension", None)
    try:
        assert isthmus.Release.open(tmp_path).recipe.personalise.strategy == "others"
    finally:
        STRATEGIES.pop("others", None)
        sys.modules.pop("others_extension", None)
