"""The slot refuses whatever is not exactly what was signed, and keeps the student it has."""

import errno
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge.encoder import load_test
from isthmus.edge.student_slot import StudentSlot
from isthmus.proto.convert import manifest_from_bytes, manifest_to_bytes
from isthmus.proto.errors import Corrupt, InvalidInput, StorageFull, WrongState
from isthmus.proto.messages import Chunk, SignedManifest

CHUNK = 256


def chunks(data: bytes, start: int = 0, *, until: int | None = None) -> Iterator[Chunk]:
    for offset in range(start, len(data) if until is None else until, CHUNK):
        piece = data[offset : offset + CHUNK]
        yield Chunk(offset, piece, zlib.crc32(piece))


def stage(slot: StudentSlot, signed: SignedManifest, files: dict[str, bytes]) -> str:
    manifest = slot.begin(signed)
    for file, offset in slot.missing(manifest):
        slot.receive(manifest, file, chunks(files[file.name], offset))
    return manifest.student_id


def install(slot: StudentSlot, signed: SignedManifest, files: dict[str, bytes]) -> str:
    student_id = stage(slot, signed, files)
    slot.verify(student_id)
    slot.activate(student_id)
    return student_id


@pytest.fixture
def slot(students: Any, tmp_path: Path) -> StudentSlot:
    return StudentSlot(tmp_path, students.public_key, load_test)


@pytest.fixture
def used(slot: StudentSlot, students: Any) -> StudentSlot:
    """With student "old" in use."""
    files = students.files("base", 1)
    install(slot, students.signed("old", "base", files), files)
    return slot


def in_use(slot: StudentSlot) -> str:
    current = slot.current()
    assert current is not None
    return current.manifest.student_id


def test_a_sound_student_is_swapped_in_and_rolled_back(used: StudentSlot, students: Any, tmp_path: Path) -> None:
    files = students.files("final", 2)
    install(used, students.signed("new", "final", files), files)
    assert in_use(used) == "new"
    assert (tmp_path / "current").resolve() == (tmp_path / "versions" / "new").resolve()
    assert used.rollback().manifest.student_id == "old"
    assert in_use(used) == "old"
    used.rollback()
    assert in_use(used) == "new"


def test_an_empty_slot(slot: StudentSlot) -> None:
    assert slot.current() is None
    with pytest.raises(WrongState, match="no previous student"):
        slot.rollback()
    with pytest.raises(WrongState, match="not on this device"):
        slot.activate("nobody")


def test_one_flipped_byte_in_the_download(used: StudentSlot, students: Any) -> None:
    files = students.files("final", 2)
    signed = students.signed("new", "final", files)
    manifest = used.begin(signed)
    file, _ = used.missing(manifest)[0]
    flipped = bytearray(files[file.name])
    flipped[len(flipped) // 2] ^= 1
    with pytest.raises(Corrupt, match="hash does not match"):
        used.receive(manifest, file, chunks(bytes(flipped)))
    with pytest.raises(WrongState, match="not been fetched whole"):
        used.verify("new")
    assert in_use(used) == "old"
    install(used, signed, files)
    assert in_use(used) == "new"


def test_one_flipped_byte_on_the_disk(used: StudentSlot, students: Any, tmp_path: Path) -> None:
    files = students.files("final", 2)
    signed = students.signed("new", "final", files)
    stage(used, signed, files)
    path = tmp_path / "staging" / "new" / "audio_encoder.onnx"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 0x80
    path.write_bytes(damaged)
    with pytest.raises(Corrupt, match="signed manifest"):
        used.verify("new")
    assert in_use(used) == "old"
    assert [file.name for file, _ in used.missing(used.begin(signed))] == ["audio_encoder.onnx"]


def test_a_download_broken_half_way_goes_on_where_it_stopped(slot: StudentSlot, students: Any) -> None:
    files = students.files("base", 1)
    manifest = slot.begin(students.signed("s", "base", files))
    file, _ = slot.missing(manifest)[0]
    content = files[file.name]

    def breaking() -> Iterator[Chunk]:
        yield from chunks(content, until=2 * CHUNK)
        raise ConnectionResetError("the link is gone")

    with pytest.raises(ConnectionResetError):
        slot.receive(manifest, file, breaking())
    assert slot.missing(manifest)[0] == (file, 2 * CHUNK)
    assert slot.receive(manifest, file, chunks(content, 2 * CHUNK)) == len(content) - 2 * CHUNK
    assert file not in [left for left, _ in slot.missing(manifest)]


def test_a_chunk_out_of_place_and_one_too_many(slot: StudentSlot, students: Any) -> None:
    files = students.files("base", 1)
    manifest = slot.begin(students.signed("s", "base", files))
    file, _ = slot.missing(manifest)[0]
    with pytest.raises(Corrupt, match="was due"):
        slot.receive(manifest, file, chunks(files[file.name], CHUNK))
    with pytest.raises(Corrupt, match="more bytes"):
        slot.receive(manifest, file, chunks(files[file.name] + b"\0" * CHUNK))


def test_a_wrong_signature(used: StudentSlot, students: Any) -> None:
    files = students.files("final", 2)
    signed = students.signed("new", "final", files)
    other = replace(signed, signature=bytes([signed.signature[0] ^ 1]) + signed.signature[1:])
    with pytest.raises(Corrupt, match="signature"):
        used.begin(other)
    forged = manifest_to_bytes(replace(manifest_from_bytes(signed.manifest_bytes), kind="base"))
    with pytest.raises(Corrupt, match="signature"):
        used.begin(SignedManifest(forged, signed.signature))
    assert in_use(used) == "old"


def test_another_student_than_the_one_asked_for(slot: StudentSlot, students: Any) -> None:
    files = students.files("base", 1)
    with pytest.raises(Corrupt, match="sent student other for mine"):
        slot.begin(students.signed("other", "base", files), "mine")


@pytest.mark.parametrize("name", ["local_head.onnx", "audio_encoder.onnx", "compressor_r1.5.onnx"])
def test_a_student_that_does_not_run_is_not_installed(used: StudentSlot, students: Any, name: str) -> None:
    files = students.files("final", 2)
    files[name] = b"not a model"
    stage(used, students.signed("new", "final", files), files)
    with pytest.raises(Corrupt, match=name):
        used.verify("new")
    with pytest.raises(WrongState):
        used.activate("new")
    assert in_use(used) == "old"


def test_a_student_of_another_width(used: StudentSlot, students: Any) -> None:
    files = students.files("final", 2)
    files["compressor_r1.onnx"] = files["compressor_r1.5.onnx"]
    stage(used, students.signed("new", "final", files), files)
    with pytest.raises(Corrupt, match="width 12 was expected"):
        used.verify("new")


def test_the_disk_full_before_and_in_the_middle(
    used: StudentSlot, students: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = students.files("final", 2)
    signed = students.signed("new", "final", files)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(StorageFull, match="cannot hold"):
            used.begin(signed)
    manifest = used.begin(signed)
    file, _ = used.missing(manifest)[0]

    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_space)
        with pytest.raises(StorageFull, match="disk is full"):
            used.receive(manifest, file, chunks(files[file.name]))
    assert in_use(used) == "old"
    install(used, signed, files)
    assert in_use(used) == "new"


def test_the_disk_full_at_the_swap(used: StudentSlot, students: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = students.files("final", 2)
    stage(used, students.signed("new", "final", files), files)
    used.verify("new")

    def no_space(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "symlink_to", no_space)
        with pytest.raises(StorageFull):
            used.activate("new")
    assert in_use(used) == "old"
    used.activate("new")
    assert in_use(used) == "new"


def test_what_did_not_change_is_not_fetched_again(used: StudentSlot, students: Any) -> None:
    old, new = students.files("base", 1), students.files("final", 2)
    manifest = used.begin(students.signed("new", "final", new))
    unchanged = {name for name in new if old.get(name) == new[name]}
    assert unchanged == {"teacher_head.onnx", "local_head.onnx"}
    assert {file.name for file, _ in used.missing(manifest)} == set(new) - unchanged


def test_a_damaged_version_is_noticed_and_not_rolled_back_to(used: StudentSlot, students: Any, tmp_path: Path) -> None:
    files = students.files("final", 2)
    install(used, students.signed("new", "final", files), files)
    assert used.is_sound("old")
    (tmp_path / "versions" / "old" / "local_head.onnx").write_bytes(b"x")
    assert not used.is_sound("old")
    with pytest.raises(Corrupt):
        used.rollback()
    assert in_use(used) == "new"


def test_pruning_keeps_what_is_needed(used: StudentSlot, students: Any, tmp_path: Path) -> None:
    for number in range(3):
        files = students.files("final", 10 + number)
        install(used, students.signed(f"s{number}", "final", files), files)
    assert used.prune(keep=("old",)) == ["s0"]
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["old", "s1", "s2"]
    assert in_use(used) == "s2"


def test_no_id_leaves_the_folder(slot: StudentSlot) -> None:
    for wild in ("../../etc", "/etc", ".", ""):
        with pytest.raises(InvalidInput):
            slot.verify(wild)
