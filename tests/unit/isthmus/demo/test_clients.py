"""Who the demo's clients are, by data set: people where there are enough, else halves of the private clips."""

from pathlib import Path

import pytest

from isthmus.data.clip import ClipRef, Listing
from isthmus.demo.clients import choose_clients

CLASSES = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


def _listing(people: int, clips_per_class: int = 4) -> Listing:
    refs = [
        ClipRef(name := f"{1001 + person}_{take}_{emotion}", Path(f"{name}.wav"), Path(f"{name}.flv"), label, name[:4])
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


def _ave(root: Path, classes: int, takes: int) -> Listing:
    """Events of AVE, the first of each category in testSet.txt; every fifth video has an event of the next category."""
    lists: dict[str, list[str]] = {"testSet.txt": [], "valSet.txt": [], "trainSet.txt": []}
    refs = []
    for take in range(takes):
        for label in range(classes):
            video, name = (
                f"video{take:03}{label:02}",
                ("testSet.txt", "valSet.txt")[take] if take < 2 else "trainSet.txt",
            )
            two = (take * classes + label) % 5 == 4
            for number in range(1 + two):
                own = (label + number) % classes
                lists[name].append(f"class {own:02}&{video}&good&{5 * number}&{5 * number + 5}")
                path = root / f"{video}.mp4"
                refs.append(ClipRef(f"{video}#class {own:02}" if two else video, path, path, own, None))
    for name, events in lists.items():
        (root / name).write_text("".join(event + "\n" for event in events))
    names = tuple(f"class {label:02}" for label in range(classes))
    return Listing("ave", names, tuple(sorted(refs, key=lambda ref: ref.name)), ())


@pytest.mark.parametrize(("classes", "takes"), [(28, 10), (6, 12), (28, 3), (6, 120)])
def test_an_ave_folder_gives_two_clients_however_few_its_test_clips_are(
    tmp_path: Path, classes: int, takes: int
) -> None:
    listing = _ave(tmp_path, classes, takes)
    split = choose_clients(listing, tmp_path)
    own = {client: _classes(listing, names) for client, names in split.clients.items()}
    assert all(len(names) >= 6 for names in split.clients.values())
    assert own["client_1"] == set(range(classes)) and own["client_2"] < own["client_1"]
    assert len(own["client_2"]) >= 3
    videos = [[name[:10] for name in names] for names in (split.public, *split.clients.values())]
    assert not set(videos[0]) & {*videos[1], *videos[2]}, "no recording is on both sides"
    assert len({*videos[1], *videos[2]}) == len(videos[1]) + len(videos[2]), "nor twice among the clients"


def test_the_test_list_of_ave_is_private_where_it_suffices(tmp_path: Path) -> None:
    listing = _ave(tmp_path, 28, 10)
    tests = (tmp_path / "trainSet.txt").read_text().splitlines()
    (tmp_path / "testSet.txt").write_text("\n".join(tests[:150]))
    (tmp_path / "trainSet.txt").write_text("\n".join(tests[150:]))
    split = choose_clients(listing, tmp_path)
    listed = {line.split("&")[1] for line in tests[:150]}
    assert {name[:10] for name in split.private} == listed


def test_too_few_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1010 would have 3 of the 60 clips here, and 6 are needed.*--people"):
        choose_clients(_listing(people=10, clips_per_class=1), tmp_path)
    with pytest.raises(ValueError, match=r"client_2 would have 0 of the 14 clips here.*Add clips of every class$"):
        choose_clients(_ave(tmp_path, 6, 2), tmp_path)
