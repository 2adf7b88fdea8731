"""Files are written whole or not at all, and texts are read as editors save them."""

import errno
import os
from pathlib import Path

import pytest

from isthmus.data.files import DiskFull, not_the_file, read_bytes, read_text, replaced, write_atomically


def test_bytes_and_text_are_written_and_nothing_is_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file.json"
    write_atomically(path, "Größe")
    assert path.read_text(encoding="utf-8") == "Größe"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def test_the_permissions_asked_for_hold_whatever_was_there(tmp_path: Path) -> None:
    path, part = tmp_path / "state.json", tmp_path / "state.json.part"
    part.write_text("left by a run that was killed")
    part.chmod(0o644)
    write_atomically(path, "{}", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull, match=r"the disk is full: file was not written.*Free some space") as caught:
        write_atomically(path, "after")
    assert caught.value.errno == number  # other layers look at the number
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_file_and_folder_are_on_the_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    write_atomically(tmp_path / "file", b"content")
    assert synced == [str(tmp_path / "file.part"), str(tmp_path)]
    with replaced(tmp_path / "film", durable=False) as part:
        part.write_bytes(b"content")
    assert len(synced) == 2


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replaced(tmp_path / "file") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_keeps_its_file_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file'$"):
        write_atomically(tmp_path / "file" / "below", "content")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_read_with_any_mark_and_line_end(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("Größe\r\nzwei\r\n".encode(encoding))
    assert read_text(path) == "Größe\nzwei\n"


def test_what_is_no_text_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"names\.txt is not UTF-8 text .*: save it as UTF-8"):
        read_text(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_text(path)
    with pytest.raises(ValueError, match="git lfs pull"):
        read_bytes(path)
    path.write_text("long enough")
    assert read_bytes(path) == b"long enough"
    with pytest.raises(ValueError, match="has over 0 MiB"):
        read_text(path, limit_bytes=4)
    assert not_the_file(path) is None
