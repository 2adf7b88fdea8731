"""The slot refuses every file that differs from the signed one, and keeps the current student."""

import errno
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.convert_student import manifest_from_bytes, manifest_to_bytes
from isthmus.proto.errors import Corrupt, InvalidInput, StorageFull, WrongState
from isthmus.proto.messages import Chunk, SignedManifest, StudentPatch
from isthmus.proto.patch import make_patch
from tests.rigs.edge.device import load_test

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
    with pytest.raises(WrongState, match="not been fetched completely"):
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


def patched_student(students: Any, old: dict[str, bytes]) -> tuple[SignedManifest, dict[str, bytes]]:
    """Student "new", whose visual encoder is also available as a patch against "old", and all files and patches."""
    files = students.files("final", 2)
    name = "visual_encoder.onnx"
    patch = make_patch(old[name], files[name], [])
    manifest = manifest_from_bytes(students.signed("new", "final", files).manifest_bytes)
    against = StudentPatch(sha256(old[name]).digest(), len(patch), sha256(patch).digest())
    entries = tuple(replace(file, patch=against) if file.name == name else file for file in manifest.files)
    manifest_bytes = manifest_to_bytes(replace(manifest, files=entries))
    return SignedManifest(manifest_bytes, students.key.sign(manifest_bytes)), {**files, f"{name}.patch": patch}


def test_a_file_comes_as_a_patch_where_its_base_is_here(used: StudentSlot, students: Any, tmp_path: Path) -> None:
    signed, files = patched_student(students, students.files("base", 1))
    manifest = used.begin(signed)
    missing = {file.name: file for file, _ in used.missing(manifest)}
    assert "visual_encoder.onnx.patch" in missing
    assert "visual_encoder.onnx" not in missing
    patch = missing["visual_encoder.onnx.patch"]
    content = files[patch.name]

    def breaking() -> Iterator[Chunk]:
        yield Chunk(0, content[:7], zlib.crc32(content[:7]))
        raise ConnectionResetError("the link is gone")

    with pytest.raises(ConnectionResetError):
        used.receive(manifest, patch, breaking())
    assert dict(used.missing(used.begin(signed)))[patch] == 7, "a restart goes on where the link broke"
    assert used.receive(manifest, patch, chunks(content, 7)) == len(content) - 7
    install(used, signed, files)
    assert (tmp_path / "current" / "visual_encoder.onnx").read_bytes() == files["visual_encoder.onnx"]
    assert not [path.name for path in (tmp_path / "current").iterdir() if "patch" in path.name]


def test_a_damaged_patch_is_fetched_again(used: StudentSlot, students: Any) -> None:
    signed, files = patched_student(students, students.files("base", 1))
    manifest = used.begin(signed)
    patch = next(file for file, _ in used.missing(manifest) if file.name.endswith(".patch"))
    with pytest.raises(Corrupt, match="hash does not match"):
        used.receive(manifest, patch, chunks(bytes(patch.size_bytes)))
    assert (patch, 0) in used.missing(manifest)
    install(used, signed, files)
    assert in_use(used) == "new"


def test_a_patch_that_does_not_give_the_file_is_not_tried_twice(used: StudentSlot, students: Any) -> None:
    signed, files = patched_student(students, students.files("base", 1))
    base = students.files("base", 1)["visual_encoder.onnx"]
    wrong = make_patch(base, base, [])
    manifest = manifest_from_bytes(signed.manifest_bytes)
    entries = tuple(
        replace(file, patch=replace(file.patch, size_bytes=len(wrong), sha256=sha256(wrong).digest()))
        if file.patch is not None
        else file
        for file in manifest.files
    )
    manifest_bytes = manifest_to_bytes(replace(manifest, files=entries))
    signed = SignedManifest(manifest_bytes, students.key.sign(manifest_bytes))
    manifest = used.begin(signed)
    patch = next(file for file, _ in used.missing(manifest) if file.name.endswith(".patch"))
    used.receive(manifest, patch, chunks(wrong))
    for again in (manifest, used.begin(signed)):
        names = [file.name for file, _ in used.missing(again)]
        assert "visual_encoder.onnx" in names
        assert patch.name not in names
    install(used, signed, files)
    assert in_use(used) == "new"


def test_without_a_sound_base_the_whole_file_comes(used: StudentSlot, students: Any, tmp_path: Path) -> None:
    signed, files = patched_student(students, students.files("base", 1))
    (tmp_path / "versions" / "old" / "visual_encoder.onnx").write_bytes(b"x")
    assert "visual_encoder.onnx" in [file.name for file, _ in used.missing(used.begin(signed))]
    install(used, signed, files)
    assert in_use(used) == "new"


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
