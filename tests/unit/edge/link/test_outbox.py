"""The outbox keeps its entries across a kill, within its bounds."""

import sqlite3
from pathlib import Path

import pytest

from isthmus.edge.link.outbox import Entry, Outbox
from isthmus.proto.errors import StorageFull, TooLarge
from isthmus.proto.limits import MAX_MESSAGE_BYTES


def entry(name: str, payload: bytes = b"x") -> Entry:
    return Entry(name, f"key of {name}", payload, 1.5)


def test_entries_outlive_the_process(tmp_path: Path) -> None:
    first = Outbox(tmp_path / "outbox.sqlite")
    first.put(entry("a", b"\0\xff"))
    first.put(entry("b"))
    with Outbox(tmp_path / "outbox.sqlite") as second:  # The first was never closed, as after a kill.
        assert second.waiting() == [entry("a", b"\0\xff"), entry("b")]
        second.acknowledge("a")
        second.acknowledge("nobody")
        assert second.get("a") is None
        assert second.get("b") == entry("b")
    first.close()


def test_the_same_name_replaces(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox.sqlite", max_entries=1) as outbox:
        outbox.put(entry("a", b"old"))
        outbox.put(entry("a", b"new"))
        assert outbox.waiting() == [entry("a", b"new")]
        outbox.clear()
        assert outbox.waiting() == []


def test_bounds(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox.sqlite", max_entries=2, max_bytes=10) as outbox:
        outbox.put(entry("a", b"12345678"))
        with pytest.raises(StorageFull, match="1 entries, 8 bytes"):
            outbox.put(entry("b", b"123"))
        outbox.put(entry("b", b"1"))
        with pytest.raises(StorageFull):
            outbox.put(entry("c", b""))
        with pytest.raises(TooLarge):
            outbox.put(entry("d", bytes(MAX_MESSAGE_BYTES + 1)))
        assert [waiting.name for waiting in outbox.waiting()] == ["a", "b"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    with Outbox(path) as outbox:
        outbox.put(entry("a"))
        pages = outbox._database.execute("PRAGMA page_count").fetchone()[0]
        outbox._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then fails as on a full disk.
        with pytest.raises(StorageFull, match="disk is full"):
            outbox.put(entry("b", bytes(100_000)))
        assert outbox.waiting() == [entry("a")]
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
