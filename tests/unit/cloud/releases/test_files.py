"""A changed file of a release is named; it is served only if the operator says so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.releases import files
from isthmus.cloud.store import releases
from isthmus.cloud.store.database import Database, Unusable
from isthmus.cloud.store.releases import ReleaseRow


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


def register(database: Database, root: Path, release_id: str = "r1") -> None:
    found = files.described(root, sorted(path for path in root.rglob("*") if path.is_file()))
    releases.put(database, ReleaseRow(Offer(release_id, ("a",), "{}", 8, (1.0,), 1, 1, 3), found, False, 1.0))


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, Path.unlink, replace_by_folder])
def test_a_changed_file_is_named(database: Database, release: Path, damage: Callable[[Path], None]) -> None:
    assert files.check(database, release) is None, "no release is known yet"
    register(database, release)
    for name in ("recipe.json", "base/encoder.onnx", "teacher/teacher.safetensors"):
        content = (release / name).read_bytes()
        damage(release / name)
        with pytest.raises(Unusable, match="--accept-release") as refused:
            files.check(database, release)
        assert f"{release / name} was changed" in str(refused.value)
        if (release / name).is_dir():
            (release / name).rmdir()
        (release / name).write_bytes(content)
        assert files.check(database, release) == "r1"


def test_each_release_that_is_known_is_recognised(database: Database, release: Path, tmp_path: Path) -> None:
    register(database, release)
    flip(release / "recipe.json")
    (release / "base" / "more.onnx").write_bytes(b"more")
    with pytest.raises(Unusable, match=r"recipe\.json and 1 more files were changed"):
        files.check(database, release)
    register(database, release, "r2")
    (release / "teacher" / "history.json").write_bytes(b"not read by the server")
    assert files.check(database, release) == "r2"
    flip(release / "recipe.json")
    (release / "base" / "more.onnx").unlink()
    assert files.check(database, release) == "r1"


def test_a_damaged_row_is_the_databases_fault(database: Database, release: Path) -> None:
    register(database, release)
    with database.writing() as connection:
        (content,) = connection.scalars(sa.text("SELECT files FROM releases"))
        changed = bytes(content).replace(b"recipe", b"sacipe")
        connection.execute(sa.text("UPDATE releases SET files = :changed"), {"changed": changed})
    with pytest.raises(Unusable, match=r"isthmus\.db is damaged"):
        files.check(database, release)
