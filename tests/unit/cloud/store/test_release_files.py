"""A changed file of a release is named; it is served only if the operator says so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.cloud.store import pins, release_files
from isthmus.cloud.store.database import Database, Unusable


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    for name in ("recipe.json", "base/encoder.onnx", "teacher/teacher.safetensors"):
        (tmp_path / "release" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "release" / name).write_bytes(name.encode())
    return tmp_path / "release"


def files(release: Path) -> list[Path]:
    return sorted(path for path in release.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, Path.unlink, replace_by_folder])
def test_a_changed_file_is_named(database: Database, release: Path, damage: Callable[[Path], None]) -> None:
    release_files.check(database, release)  # nothing is pinned yet
    assert not release_files.is_pinned(database)
    release_files.pin(database, release, files(release))
    assert release_files.is_pinned(database)
    for name in ("recipe.json", "base/encoder.onnx", "teacher/teacher.safetensors"):
        content = (release / name).read_bytes()
        damage(release / name)
        with pytest.raises(Unusable, match="--accept-release") as refused:
            release_files.check(database, release)
        assert f"{release / name} was changed" in str(refused.value)
        if (release / name).is_dir():
            (release / name).rmdir()
        (release / name).write_bytes(content)
        release_files.check(database, release)


def test_what_is_pinned_anew_is_the_new_truth(database: Database, release: Path) -> None:
    release_files.pin(database, release, files(release))
    flip(release / "recipe.json")
    (release / "base" / "more.onnx").write_bytes(b"more")
    (release / "teacher" / "history.json").write_bytes(b"not read by the server")
    with pytest.raises(Unusable, match=r"recipe\.json and 1 more files were changed"):
        release_files.check(database, release)
    release_files.pin(database, release, files(release))
    release_files.check(database, release)


def test_a_damaged_pin_is_the_databases_fault(database: Database, release: Path) -> None:
    release_files.pin(database, release, files(release))
    pinned = pins.get(database, "release_files")
    assert pinned is not None
    pins.put(database, "release_files", pinned.replace(b"recipe", b"sacipe"))
    with pytest.raises(Unusable, match=r"isthmus\.db is damaged"):
        release_files.check(database, release)
