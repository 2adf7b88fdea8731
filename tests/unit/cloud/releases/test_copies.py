"""A worker's copies of releases: whole or not there, few at a time, and never taken from one who uses them."""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.releases import files
from isthmus.cloud.releases.copies import Copies
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.releases import ReleaseFile, ReleaseRow
from isthmus.proto.errors import Corrupt, InvalidInput, StorageFull

SIZE = 1_000


def published(artefacts: Artefacts, folder: Path, release_id: str) -> ReleaseRow:
    """Publish two files of the same name in two folders, ``2 * SIZE`` bytes together."""
    root = folder / release_id
    for name in ("teacher/w.safetensors", "base/w.safetensors"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(hashlib.shake_128(f"{release_id}{name}".encode()).digest(SIZE))
    described = files.described(root, sorted(path for path in root.rglob("*") if path.is_file()))
    files.store(artefacts, release_id, root, described)
    return ReleaseRow(Offer(release_id, ("a",), "{}", 8, (1.0,), 1, 1, 3), described, True, 1.0)


@pytest.fixture
def artefacts(tmp_path: Path) -> Artefacts:
    return Artefacts(str(tmp_path / "artefacts"))


def test_a_copy_holds_what_was_published_and_is_made_once(artefacts: Artefacts, tmp_path: Path) -> None:
    row = published(artefacts, tmp_path, "r1")
    copies = Copies(tmp_path / "copies", artefacts, 10 * SIZE)
    folder = copies.folder(row)
    for name in row.files:
        assert (folder / name).read_bytes() == (tmp_path / "r1" / name).read_bytes()
    artefacts.remove(files.owner_of("r1"))
    assert copies.folder(row) == folder
    copies.let_go("r1")
    assert copies.folder(row) == folder, "it is still here"


def test_those_used_the_longest_time_ago_go_but_none_that_is_in_use(artefacts: Artefacts, tmp_path: Path) -> None:
    rows = [published(artefacts, tmp_path, f"r{number}") for number in range(4)]
    mine, other = (Copies(tmp_path / "copies", artefacts, 4 * SIZE) for _ in range(2))
    for row in rows[:2]:
        mine.folder(row)
    mine.let_go("r1")
    assert other.folder(rows[0]).is_dir(), "two processes may use one copy"
    mine.let_go("r0")
    other.folder(rows[2])
    there = {path.name for path in (tmp_path / "copies").iterdir() if path.is_dir()}
    assert there == {"r0", "r2"}, "r0 was used the longest time ago, and another process uses it"
    other.let_go("r0")
    other.let_go("r2")
    other.folder(rows[3])
    assert {path.name for path in (tmp_path / "copies").iterdir() if path.is_dir()} == {"r2", "r3"}


def test_a_release_larger_than_the_bound_is_copied_alone(artefacts: Artefacts, tmp_path: Path) -> None:
    copies = Copies(tmp_path / "copies", artefacts, SIZE)
    for row in (published(artefacts, tmp_path, "r1"), published(artefacts, tmp_path, "r2")):
        assert copies.folder(row).is_dir()
        copies.let_go(row.release_id)
    assert [path.name for path in (tmp_path / "copies").iterdir() if path.is_dir()] == ["r2"]


def test_several_that_need_the_same_copy_at_once_make_it_once(artefacts: Artefacts, tmp_path: Path) -> None:
    row = published(artefacts, tmp_path, "r1")
    opened: list[str] = []

    class Counting(Artefacts):
        def open(self, owner: str, name: str, sha256: bytes | None = None):  # type: ignore[no-untyped-def]
            opened.append(name)
            return super().open(owner, name, sha256)

    counting = Counting(str(tmp_path / "artefacts"))
    threads = [
        threading.Thread(target=Copies(tmp_path / "copies", counting, 9 * SIZE).folder, args=(row,)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == len(row.files)


@pytest.mark.parametrize("damage", ["flip", "remove", "lengthen"])
def test_a_damaged_or_lost_file_is_named_and_publishing_again_mends_it(
    artefacts: Artefacts, tmp_path: Path, damage: str
) -> None:
    row = published(artefacts, tmp_path, "r1")
    stored = sorted((tmp_path / "artefacts" / files.owner_of("r1")).iterdir())[0]
    if damage == "lengthen":
        stored.write_bytes(stored.read_bytes() + bytes(1))
    elif damage == "flip":
        stored.write_bytes(bytes([stored.read_bytes()[0] ^ 1]) + stored.read_bytes()[1:])
    else:
        stored.unlink()
    copies = Copies(tmp_path / "copies", artefacts, 9 * SIZE)
    with pytest.raises(Corrupt, match=r"w\.safetensors of release r1 is (damaged in|gone from) the artefacts.*again"):
        copies.folder(row)
    assert not (tmp_path / "copies" / "r1").exists() and not (tmp_path / "copies" / "r1.part").exists()
    files.store(artefacts, "r1", tmp_path / "r1", row.files)
    assert copies.folder(row).is_dir()


def test_a_full_disk_is_seen_before_anything_is_fetched(
    artefacts: Artefacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = published(artefacts, tmp_path, "r1")
    monkeypatch.setattr("isthmus.cloud.releases.copies._SPARE_BYTES", 1 << 60)
    with pytest.raises(StorageFull, match="2000 bytes"):
        Copies(tmp_path / "copies", artefacts, 9 * SIZE).folder(row)


def test_no_file_is_written_outside_the_copy(artefacts: Artefacts, tmp_path: Path) -> None:
    row = published(artefacts, tmp_path, "r1")
    for path in ("../outside", "/outside"):
        bad = ReleaseRow(row.offer, {path: ReleaseFile("00" * 32, 1)}, True, 1.0)
        with pytest.raises(Corrupt, match="outside its folder"):
            Copies(tmp_path / "copies", artefacts, 9 * SIZE).folder(bad)


def test_a_file_that_changes_while_it_is_published_is_refused(artefacts: Artefacts, tmp_path: Path) -> None:
    row = published(artefacts, tmp_path, "r1")
    (tmp_path / "r1" / "base" / "w.safetensors").write_bytes(b"another")
    artefacts.remove(files.owner_of("r1"))
    with pytest.raises(InvalidInput, match=r"base/w\.safetensors changed while it was published"):
        files.store(artefacts, "r1", tmp_path / "r1", row.files)
    with pytest.raises(InvalidInput, match="a name that cannot be stored"):
        files.store(artefacts, "r1", tmp_path / "r1", {"base/a name": ReleaseFile("00" * 32, 1)})


def test_what_a_killed_worker_had_fetched_makes_room(artefacts: Artefacts, tmp_path: Path) -> None:
    rows = [published(artefacts, tmp_path, f"r{number}") for number in range(2)]
    left, fetching = (tmp_path / "copies" / f"{name}.part" for name in ("killed", "alive"))
    for part in (left, fetching):
        part.mkdir(parents=True)
        (part / "w.safetensors").write_bytes(bytes(SIZE))
    copies = Copies(tmp_path / "copies", artefacts, 10 * SIZE)
    with copies._alone("alive"):
        copies.folder(rows[0])
        assert not left.exists() and fetching.exists(), "another worker is fetching it at this moment"
    copies.folder(rows[1])
    assert not fetching.exists()


def test_copies_that_another_process_removes_meanwhile_are_no_failure(
    artefacts: Artefacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [published(artefacts, tmp_path, f"r{number}") for number in range(3)]
    copies = Copies(tmp_path / "copies", artefacts, 9 * SIZE)
    for row in rows[:2]:
        copies.folder(row)
        copies.let_go(row.release_id)
    walk = os.walk

    def removed(folder: Path) -> Iterator[Any]:
        for found in walk(folder):
            shutil.rmtree(tmp_path / "copies" / "r0", ignore_errors=True)
            yield found

    monkeypatch.setattr("isthmus.cloud.releases.copies.os.walk", removed)
    assert copies.folder(rows[2]).is_dir()
