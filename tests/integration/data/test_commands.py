"""``isthmus data check``: its output, its files and its exit codes."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.data.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "set"
    result = runner.invoke(app, ["make", "crema-d", str(root), "--actors", "2", "--takes", "1", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "12 synthetic clips" in result.output
    content = (root / "VideoFlash/1001_DFA_NEU_XX.flv").read_bytes()
    (root / "VideoFlash/1001_DFA_NEU_XX.flv").write_bytes(content[:2_000])
    (root / "AudioWAV/holiday.wav").write_bytes(b"")
    return root


def test_check_counts_and_names_the_damaged(made: Path) -> None:
    result = runner.invoke(app, ["check", str(made)])
    assert result.exit_code == 0, result.output
    assert "Layout crema-d: 11 clips decode, 2 damaged." in result.output
    assert "2 actors: 1001 (5), 1002 (6)" in result.output
    assert "damaged: 1001_DFA_NEU_XX: 1001_DFA_NEU_XX.flv is truncated" in result.output
    assert "damaged: holiday: the name does not parse" in result.output


def test_check_strict_ends_with_one(made: Path) -> None:
    assert runner.invoke(app, ["check", str(made), "--strict", "--no-decode"]).exit_code == 1


def test_check_without_decoding_sees_names_only(made: Path) -> None:
    result = runner.invoke(app, ["check", str(made), "--no-decode"])
    assert result.exit_code == 0
    assert "12 clips are listed (not decoded), 1 damaged." in result.output


def test_a_folder_of_no_layout_is_one_clear_line(tmp_path: Path) -> None:
    result = runner.invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("isthmus data check: ")
    assert result.output.count("\n") == 1


def test_split_by_actor_is_written(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    result = runner.invoke(app, ["split", str(made), "-o", str(path), "--actor", "1002"])
    assert result.exit_code == 0, result.output
    split = json.loads(path.read_text())
    assert len(split["clients"]["1002"]) == 6
    assert len(split["public"]) == 6
    assert runner.invoke(app, ["split", str(made), "-o", str(path), "--actor", "1009"]).exit_code == 1
    both = ["split", str(made), "-o", str(path), "--actor", "1002", "--published", "x.csv"]
    assert runner.invoke(app, both).exit_code == 2


def test_make_ave_and_its_published_split(tmp_path: Path) -> None:
    root, path = tmp_path / "set", tmp_path / "split.json"
    assert runner.invoke(app, ["make", "ave", str(root), "--classes", "2", "--takes", "3"]).exit_code == 0
    assert runner.invoke(app, ["split", str(root), "-o", str(path)]).exit_code == 0
    split = json.loads(path.read_text())
    assert {len(names) for names in split["clients"].values()} == {1}
    (root / "valSet.txt").unlink()
    result = runner.invoke(app, ["check", str(root)])
    assert result.exit_code == 1
    assert "valSet.txt is missing" in result.output


def test_make_refuses_bad_arguments(tmp_path: Path) -> None:
    result = runner.invoke(app, ["make", "crema-d", str(tmp_path / "x"), "--difficulty", "2"])
    assert result.exit_code == 1
    assert "between 0 and 1" in result.output


def test_check_writes_out_what_a_terminal_would_obey(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "AudioWAV").mkdir(parents=True)
    (root / "VideoFlash").symlink_to(made / "VideoFlash")
    for path in (made / "AudioWAV").iterdir():
        (root / "AudioWAV" / path.name).symlink_to(path)
    for name in (b"[old].wav", b"\x1b[31mred.wav", b"\xff.wav", "Grün 日本.wav".encode()):
        (root / "AudioWAV" / os.fsdecode(name)).write_bytes(b"x")
    said = runner.invoke(app, ["check", str(root), "--no-decode"]).output
    for line in ("damaged: [old]:", r"damaged: \x1b[31mred:", r"damaged: \udcff:", "damaged: Grün 日本:"):
        assert line in said
