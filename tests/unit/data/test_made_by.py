"""A results folder says which code has measured its cells."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from isthmus.data import made_by as module
from isthmus.data.made_by import FILE, UNKNOWN, code, made_by


def test_a_new_folder_has_one_code_and_no_warning(tmp_path: Path) -> None:
    said: list[str] = []
    assert made_by(tmp_path / "new", said.append) == [code()] == made_by(tmp_path / "new", said.append)
    assert said == []


@pytest.mark.parametrize("changed", [None, "isthmus/cli.py", "edge/link/over_grpc.py"])
def test_a_clone_and_its_installation_are_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str | None
) -> None:
    def hashed(root: Path, rooms: Path) -> str:
        def found(name: str) -> SimpleNamespace:
            room = name.partition(".")[2]
            return SimpleNamespace(origin=str((rooms / room if room else root / "isthmus") / "__init__.py"))

        monkeypatch.setattr(module.importlib.util, "find_spec", found)
        return code.__wrapped__()

    clone, installed = tmp_path / "clone", tmp_path / "site-packages"
    for rooms in (clone, installed / "isthmus"):
        for room in ("cloud", "data", "distill", "edge", "proto"):
            (rooms / room / "link").mkdir(parents=True)
            (rooms / room / "__init__.py").write_text(room)
            (rooms / room / "link" / "over_grpc.py").write_text("link")
    for root in (clone, installed):
        (root / "isthmus").mkdir(exist_ok=True)
        for name in ("__init__.py", "cli.py"):
            (root / "isthmus" / name).write_text(name)
    if changed is not None:
        (clone / changed).write_text("changed")
    same = hashed(clone, clone) == hashed(installed, installed / "isthmus")
    assert same == (changed is None)


def test_cells_without_a_record_are_of_unknown_code(tmp_path: Path) -> None:
    (tmp_path / "rows-0.json").write_text("[]")
    said: list[str] = []
    assert made_by(tmp_path, said.append) == [UNKNOWN, code()] == made_by(tmp_path, said.append)
    assert len(said) == 1 and "empty folder" in said[0]


def test_every_code_is_kept_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = made_by(tmp_path / "out", said.append)
    monkeypatch.setattr(module, "code", lambda: "0.9.9, sources 0123456789ab")
    assert made_by(tmp_path / "out", said.append) == [*first, "0.9.9, sources 0123456789ab"]
    monkeypatch.undo()
    assert made_by(tmp_path / "out", said.append) == [*first, "0.9.9, sources 0123456789ab"] and len(said) == 1


def test_processes_that_begin_together_find_no_other_code(tmp_path: Path) -> None:
    """Each thread opens the lock file itself, as separate processes would."""
    said: list[str] = []
    with ThreadPoolExecutor(8) as several:
        found = list(several.map(lambda _: made_by(tmp_path / "out", said.append), range(16)))
    assert found == [[code()]] * 16 and said == []


@pytest.mark.parametrize("damaged", ['{"a": 1}', "[1]", '["cut o'])
def test_a_damaged_record_is_told(tmp_path: Path, damaged: str) -> None:
    (tmp_path / FILE).write_text(damaged)
    with pytest.raises(ValueError, match="not a list of names"):
        made_by(tmp_path, print)
    assert (tmp_path / FILE).read_text() == damaged
