"""Who the demo's clients are, by data set: people where there are enough, else halves of the private clips."""

from pathlib import Path

import pytest

from isthmus.data.clip import ClipRef, Listing
from isthmus.demo.clients import choose_clients

CLASSES = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


def _listing(people: int, clips_per_class: int = 4) -> Listing:
    refs = [
        ClipRef(f"{1001 + person}_{take}_{emotion}", Path("a.wav"), Path("a.flv"), label, str(1001 + person))
        for person in range(people)
        for label, emotion in enumerate(CLASSES)
        for take in range(clips_per_class)
    ]
    return Listing("crema-d", CLASSES, tuple(sorted(refs, key=lambda ref: ref.name)), ())


def _classes(listing: Listing, names: tuple[str, ...]) -> set[int | None]:
    return {ref.label for ref in listing.refs if ref.name in names}


def test_the_last_two_of_many_people_are_the_clients(tmp_path: Path) -> None:
    listing = _listing(people=10)
    split = choose_clients(listing, tmp_path)
    assert list(split.clients) == ["1009", "1010"]
    assert _classes(listing, split.clients["1009"]) == set(range(6))
    assert _classes(listing, split.clients["1010"]) == {1, 3, 5}
    assert {name[:4] for name in split.public} == {str(1001 + person) for person in range(8)}
    assert not set(split.public) & set(split.private)


def test_a_manifest_reserves_people_for_clients(tmp_path: Path) -> None:
    listing = _listing(people=11)
    rows = [f"{ref.name},{'private' if ref.actor in ('1002', '1004', '1006') else 'public'}" for ref in listing.refs]
    (tmp_path / "manifest.csv").write_text("\n".join(["clip,role", *rows]))
    split = choose_clients(listing, tmp_path)
    assert list(split.clients) == ["1002", "1004"]
    assert "1006" not in {name[:4] for name in split.public}, "nobody of that role is public"


def test_people_may_be_named(tmp_path: Path) -> None:
    split = choose_clients(_listing(people=4), tmp_path, people=("1003", "1001"))
    assert list(split.clients) == ["1003", "1001"]
    for people in (("1003",), ("1003", "1003"), ("1003", "nobody")):
        with pytest.raises(ValueError, match="two people with clips here: 1001, 1002, 1003, 1004"):
            choose_clients(_listing(people=4), tmp_path, people=people)


def test_few_people_share_their_clips(tmp_path: Path) -> None:
    listing = _listing(people=3, clips_per_class=20)
    split = choose_clients(listing, tmp_path, seed=1)
    assert list(split.clients) == ["client_1", "client_2"]
    assert _classes(listing, split.clients["client_1"]) == set(range(6))
    assert _classes(listing, split.clients["client_2"]) == {1, 3, 5}
    assert len(split.public) + len(split.private) == len(listing.refs)


def test_too_few_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1010: fewer than 6 clips"):
        choose_clients(_listing(people=10, clips_per_class=1), tmp_path)
