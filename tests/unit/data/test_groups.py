"""Recordings and pictures are never on both sides of a split."""

from pathlib import Path

import pytest

from isthmus.data.groups import Groups, read_groups
from isthmus.data.layouts.listing import read_listing


def _written(folder: Path, text: str) -> Path:
    (folder / "manifest.csv").write_text(text)
    return folder


def test_clips_of_one_recording_or_picture_belong_together(tmp_path: Path) -> None:
    text = "clip,emodb_utterance,face_image\na,r1,f1\nb,r1,f2\nc,r2,f2\nd,r3,f3\n"
    groups = read_groups(_written(tmp_path, text), "abcd")
    assert groups.distinct("abcd") == ("a", "c", "d")
    assert groups.distinct("bcd") == ("b", "d")
    assert groups.share("b", {"c"}) and groups.share("b", {"a"}) and not groups.share("a", {"c", "d"})


@pytest.mark.parametrize("text", [None, "clip,length\na,3\n"])
def test_without_columns_of_groups_every_clip_is_its_own(tmp_path: Path, text: str | None) -> None:
    groups = read_groups(tmp_path if text is None else _written(tmp_path, text), ["a", "b"])
    assert groups.distinct(["a", "b"]) == ("a", "b")
    assert not groups.share("a", {"b"})


def test_a_manifest_without_a_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say what b was made of"):
        read_groups(_written(tmp_path, "clip,source\na,r1\n"), ["a", "b"])


def test_every_recording_of_ravface_occurs_once(ravface: Path) -> None:
    listing = read_listing(ravface, "auto")
    names = [ref.name for ref in listing.refs]
    assert len(names) == 959 and len({ref.actor for ref in listing.refs}) == 20
    groups: Groups = read_groups(ravface, names)
    assert groups.distinct(names) == tuple(names)


def test_emopair_is_a_third_as_large_without_copies(emopair: Path) -> None:
    names = [ref.name for ref in read_listing(emopair, "auto").refs]
    groups = read_groups(emopair, names)
    kept = groups.distinct(names)
    recordings = [next(part for part in groups.of[name] if part.startswith("emodb")) for name in kept]
    assert len(set(recordings)) == len(kept) < len(names) / 2
