"""The paper's numbers of public, private, selection and test clips, and what splits refuse."""

from pathlib import Path

import pytest

from isthmus.data.clip import ClipRef, Damage, Listing
from isthmus.data.groups import Groups, read_groups
from isthmus.data.layouts.crema_d import CLASSES
from isthmus.data.layouts.listing import read_listing
from isthmus.data.splits import Split, apart, by_actor, by_class, latency_halves, published, stratified

CREMA_D_COUNTS = (1087, 1271, 1271, 1271, 1271, 1271)


def _listing(counts: tuple[int, ...], actors: int = 91) -> Listing:
    refs = [
        ClipRef(
            f"{1001 + number % actors}_{number // actors:03d}_{CLASSES[label]}_XX",
            None,
            None,
            label,
            f"{1001 + number % actors}",
        )
        for label, count in enumerate(counts)
        for number in range(count)
    ]
    return Listing(
        "crema-d", CLASSES, tuple(sorted(refs, key=lambda ref: ref.name)), (Damage("1001_bad_NEU_XX", "cut"),)
    )


def test_stratified_split_has_the_papers_sizes() -> None:
    split = by_class(_listing(CREMA_D_COUNTS))
    assert len(split.public) == 6_698
    assert len(split.private) == 744
    emotions = {client: {name.split("_")[2] for name in names} for client, names in split.clients.items()}
    assert emotions == {"client_1": {"NEU", "HAP", "SAD"}, "client_2": {"FEA", "DIS", "ANG"}}


def test_latency_halves_have_the_papers_sizes() -> None:
    # Client 1 of the paper: 377 private clips of three classes, of which 189 are tested.
    labels = [0] * 109 + [1] * 134 + [2] * 134
    names = [f"clip{number:03d}" for number in range(377)]
    selection, test = latency_halves(names, labels, seed=0)
    assert (len(selection), len(test)) == (188, 189)
    assert latency_halves(names[::-1], labels[::-1], seed=0) == (selection, test)
    assert latency_halves(names, labels, seed=1) != (selection, test)


def test_by_actor_makes_a_client_of_every_private_person() -> None:
    split = by_actor(_listing((8, 8, 8, 8, 8, 8), actors=4), ["1004", "1002"])
    assert list(split.clients) == ["1004", "1002"]
    assert all(name.startswith("1002") for name in split.clients["1002"])
    assert {name[:4] for name in split.public} == {"1001", "1003"}


@pytest.mark.parametrize(("actors", "message"), [(["1009"], "1009"), ([], "none given"), (["1001", "1002"], "public")])
def test_by_actor_refuses(actors: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_actor(_listing((2, 2, 2, 2, 2, 2), actors=2), actors)


def test_nothing_is_on_two_sides_of_a_split_that_is_kept_apart() -> None:
    made_of = {"a": {"r1", "f1"}, "b": {"r1", "f2"}, "c": {"r2", "f3"}, "d": {"r2", "f4"}, "e": {"r3", "f1"}}
    groups = Groups({name: frozenset(parts) for name, parts in made_of.items()})
    split = apart(Split("by-class", ("d", "e", "f"), {"one": ("a", "b"), "two": ("c",)}), groups)
    assert split == Split("by-class", ("f",), {"one": ("a",), "two": ("c",)}), "f is in no group"
    with pytest.raises(ValueError, match="no clip is left for the public side"):
        apart(Split("by-class", ("d",), {"two": ("c",)}), groups)


def test_emopair_can_be_split_without_leaks(emopair: Path) -> None:
    listing = read_listing(emopair)
    groups = read_groups(emopair, [ref.name for ref in listing.refs])
    split = apart(by_class(listing), groups)
    private = [made_of for name in split.private for made_of in groups.made_of(name)]
    public = {made_of for name in split.public for made_of in groups.made_of(name)}
    assert len(private) == len(set(private)) == 2 * len(split.private), "one clip per recording and per picture"
    assert not public & set(private)
    assert len(split.private) > 60 and len(split.public) > 400


def test_by_class_takes_given_names_and_groups() -> None:
    listing = _listing((2, 2, 2, 2, 2, 2), actors=2)
    private = [ref.name for ref in listing.refs if ref.actor == "1002"]
    split = by_class(listing, [*private, "1001_bad_NEU_XX"], groups=[[0], [5, 1]])
    assert [len(names) for names in split.clients.values()] == [1, 2]
    assert len(split.public) == 6
    with pytest.raises(ValueError, match="not in the data set"):
        by_class(listing, ["1001_000_ABC_XX"])
    with pytest.raises(ValueError, match="overlap"):
        by_class(listing, private, groups=[[0], [0, 1]])
    with pytest.raises(ValueError, match="client_1, client_2 would have no clips"):
        by_class(listing, private[:1], groups=[[3], [0, 1]])
    with pytest.raises(ValueError, match="not between"):
        stratified(listing.refs, share=1.0, seed=0)


@pytest.mark.parametrize(
    "lines",
    ["{}\n{}\n", '"{}"\n{}\n', '"{}","Race car, auto racing"\n{},Bark\n', "clip,label\n{}\n{},Bark\n"],
    ids=["names alone", "one in quotes", "in quotes, with labels", "one with its label"],
)
def test_a_name_that_holds_a_comma_is_one_name(tmp_path: Path, lines: str) -> None:
    """AVE names a recording of two events by its class, too, and classes such as this one hold commas."""
    names = ("1hCzhknzCTU#Race car, auto racing", "BqvWHkzCtu", "c4dOzamcDxJ", "s00kz_qCmZW")
    labels = (1, 0, 0, 1)
    refs = tuple(ClipRef(name, None, None, label, "") for name, label in zip(names, labels, strict=True))
    private = tmp_path / "private.csv"
    private.write_text(lines.format(*names[:2]))
    split = published(Listing("ave", ("Bark", "Race car, auto racing"), refs, ()), private)
    assert split.clients == {"client_1": names[1:2], "client_2": names[:1]}


def test_published_csv_with_header_and_file_endings(tmp_path: Path) -> None:
    listing = _listing((2, 2, 2, 2, 2, 2), actors=2)
    private = tmp_path / "test.csv"
    private.write_text("clip,label\n1002_000_NEU_XX.wav,NEU\n1002_000_ANG_XX,ANG\n\n")
    split = published(listing, private)
    assert split.clients == {"client_1": ("1002_000_NEU_XX",), "client_2": ("1002_000_ANG_XX",)}
    assert len(split.public) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1002_000_NEU_XX,HAP\n", "labelled HAP"),
        ("clip,label\n1002_999_NEU_XX,NEU\n", ":2: the data set has no clip"),
        ("1002_999_NEU_XX,NEU\n", ":1: the data set has no clip"),
        ("clip,label\n", "names no clip"),
    ],
)
def test_published_lists_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    private = tmp_path / "test.csv"
    private.write_text(text)
    with pytest.raises(ValueError, match=message):
        published(_listing((2, 2, 2, 2, 2, 2), actors=2), private)


def test_a_missing_split_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test\.csv is missing"):
        published(_listing((2, 2, 2, 2, 2, 2)), tmp_path / "test.csv")


def test_split_survives_json_and_bad_json_is_refused() -> None:
    split = Split("by-actor", ("a", "b"), {"1": ("c",)})
    assert Split.from_json(split.to_json()) == split
    with pytest.raises(ValueError, match="contains a clip twice"):
        Split.from_json('{"name": "x", "public": ["a"], "clients": {"1": ["a"]}}')
    with pytest.raises(ValueError, match="no split"):
        Split.from_json("[1]")
