"""A results folder says which code has measured its cells."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isthmus.data import made_by as module
from isthmus.data.made_by import FILE, UNKNOWN, code, made_by


def test_a_new_folder_has_one_code_and_no_warning(tmp_path: Path) -> None:
    said: list[str] = []
    assert made_by(tmp_path / "new", said.append) == [code()] == made_by(tmp_path / "new", said.append)
    assert said == []


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
    """Each thread opens the lock anew, as processes do."""
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
