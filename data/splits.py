"""Which clips are public and which are private: the paper's splits, published lists, and one client per person.

Splits consist of sorted clip names and depend only on the arguments.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np

from isthmus.data.clip import ClipRef, Listing
from isthmus.data.files import open_text
from isthmus.data.groups import Groups
from isthmus.data.layouts import ave

PRIVATE_SHARE: Final = 0.1


@dataclass(frozen=True)
class Split:
    """Names of the public clips, and of each client's own. No name occurs twice."""

    name: str
    public: tuple[str, ...]
    clients: Mapping[str, tuple[str, ...]]

    @property
    def private(self) -> tuple[str, ...]:
        """All clients' clips together, sorted."""
        return tuple(sorted(name for names in self.clients.values() for name in names))

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "public": self.public, "clients": dict(self.clients)}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Split":
        """Read a split. Raises ValueError if the text is not a split, or if a clip occurs twice in it."""
        raw = json.loads(text)
        try:
            clients = {str(client): tuple(map(str, names)) for client, names in raw["clients"].items()}
            split = Split(str(raw["name"]), tuple(map(str, raw["public"])), clients)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no split: {error!r}") from error
        everyone = [*split.public, *split.private]
        if len(everyone) != len(set(everyone)):
            raise ValueError("no split: it contains a clip twice")
        return split


def by_actor(listing: Listing, private_actors: Sequence[str]) -> Split:
    """Return a split with one client per private actor, named after the actor; everybody else is public.

    Raises ValueError if an actor has no clips, no actor is private, or nobody would be public.
    """
    wanted = tuple(dict.fromkeys(private_actors))
    actors = sorted({ref.actor for ref in listing.refs if ref.actor is not None})
    unknown = [actor for actor in wanted if actor not in actors]
    if unknown or not wanted:
        known = ", ".join(actors) or "none"
        raise ValueError(f"no clips of actor {', '.join(unknown) or '(none given)'}: this data set has {known}")
    clients = {actor: _names(ref for ref in listing.refs if ref.actor == actor) for actor in wanted}
    public = _names(ref for ref in listing.refs if ref.actor not in clients)
    return _checked(Split("by-actor", public, clients))


def by_class(
    listing: Listing,
    private: Sequence[str] | None = None,
    *,
    seed: int = 0,
    share: float = PRIVATE_SHARE,
    groups: Sequence[Sequence[int]] | None = None,
) -> Split:
    """Return the paper's split: client_1 holds the private clips of the first half of the classes, client_2 of the
    rest.

    ``private`` names the private clips; without it, ``share`` of the clips is drawn with ``seed``, in proportion to the
    classes. ``groups`` are the classes of client_1, client_2 and so on; private clips of no group are left out. Raises
    ValueError for a private name that the listing lacks, a class in two groups, and an empty side.
    """
    drawn = stratified(listing.refs, share=share, seed=seed) if private is None else tuple(private)
    of_name = {ref.name: ref for ref in listing.refs}
    gone = _left_out(listing)
    missing = [name for name in drawn if name not in of_name and name not in gone]
    if missing:
        raise ValueError(f"{len(missing)} private clips are not in the data set, as {', '.join(missing[:3])}")
    half = (len(listing.classes) + 1) // 2
    everything = range(len(listing.classes))
    chosen = (
        [list(group) for group in groups] if groups is not None else [list(everything[:half]), list(everything[half:])]
    )
    flat = [label for group in chosen for label in group]
    if len(flat) != len(set(flat)) or not set(flat) <= set(everything):
        raise ValueError(f"the groups of classes {chosen} overlap or go beyond the {len(listing.classes)} classes")
    private_refs = [of_name[name] for name in dict.fromkeys(drawn) if name in of_name]
    clients = {
        f"client_{number}": _names(ref for ref in private_refs if ref.label in group)
        for number, group in enumerate(chosen, start=1)
    }
    public = _names(ref for ref in listing.refs if ref.name not in set(drawn))
    return _checked(Split("by-class", public, clients))


def published(listing: Listing, private_list: Path) -> Split:
    """Return the paper's split with the private clips of a published list.

    The list is AVE's testSet.txt (`label&id&quality&start&end`) or a CSV. The first column of the CSV is a clip's name
    (with or without file ending); the second, if there is one, is its label. A header line is skipped.

    Raises ValueError naming the fault: no such file, a clip that the data set lacks, a label that contradicts it.
    """
    if not private_list.is_file():
        raise ValueError(f"the split list {private_list} is missing")
    if listing.layout == ave.LAYOUT and private_list.name in ave.LISTS:
        split = by_class(listing, ave.read_lists(private_list.parent)[private_list.name])
    else:
        split = by_class(listing, _csv_names(listing, private_list))
    return Split("published", split.public, split.clients)


def apart(split: Split, groups: Groups) -> Split:
    """Return the split with no recording and no picture on two sides.

    Of the clients' clips one per recording and picture is kept. Public clips that share a recording or a picture with
    one of these are left out. Raises ValueError if a side would be empty.
    """
    kept = set(groups.distinct(split.private))
    clients = {client: tuple(name for name in names if name in kept) for client, names in split.clients.items()}
    shown = {made_of for name in kept for made_of in groups.made_of(name)}
    public = tuple(name for name in split.public if not groups.made_of(name) & shown)
    return _checked(Split(split.name, public, clients))


def stratified(refs: Iterable[ClipRef], *, share: float, seed: int) -> tuple[str, ...]:
    """Draw ``share`` of the clips with ``seed``, in proportion to the classes (largest remainders), and return sorted
    names.

    Raises ValueError for a share outside 0..1 and for clips without a label.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of {share:g} is not between 0 and 1")
    of_label: dict[int, list[str]] = {}
    for ref in refs:
        if ref.label is None:
            raise ValueError(f"{ref.name} has no label: only labelled clips can be drawn class by class")
        of_label.setdefault(ref.label, []).append(ref.name)
    labels = sorted(of_label)
    exact = {label: share * len(of_label[label]) for label in labels}
    counts = {label: int(exact[label]) for label in labels}
    left = round(share * sum(map(len, of_label.values()))) - sum(counts.values())
    for label in sorted(labels, key=lambda each: (counts[each] - exact[each], each))[:left]:
        counts[label] += 1
    rng = np.random.default_rng(seed)
    return tuple(sorted(name for label in labels for name in _draw(of_label[label], counts[label], rng)))


def latency_halves(names: Sequence[str], labels: Sequence[int], seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return selection clips and test clips of the latency-sensitive scenario, both sorted.

    Half of each class, rounded down, goes to selection and the rest to test. The same clips in another order give the
    same halves. Raises ValueError if names and labels do not match.
    """
    if len(names) != len(labels) or len(set(names)) != len(names):
        raise ValueError(f"{len(names)} names ({len(set(names))} different) for {len(labels)} labels")
    of_label: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        of_label.setdefault(int(label), []).append(name)
    rng = np.random.default_rng(seed)
    selection = {name for label in sorted(of_label) for name in _draw(of_label[label], len(of_label[label]) // 2, rng)}
    return tuple(sorted(selection)), tuple(sorted(name for name in names if name not in selection))


def _draw(names: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    ordered = sorted(names)
    return [ordered[position] for position in rng.permutation(len(ordered))[:count]]


def _left_out(listing: Listing) -> set[str]:
    """Return the names of clips that exist but are in no split: damaged, or with only one modality."""
    return {damage.name for damage in listing.damaged} | {ref.name for ref in listing.incomplete}


def _names(refs: Iterable[ClipRef]) -> tuple[str, ...]:
    return tuple(sorted(ref.name for ref in refs))


def _checked(split: Split) -> Split:
    if not split.public:
        raise ValueError(f"split {split.name}: no clip is left for the public side")
    empty = [client for client, names in split.clients.items() if not names]
    if empty:
        raise ValueError(f"split {split.name}: {', '.join(empty)} would have no clips")
    return split


def _csv_names(listing: Listing, path: Path) -> tuple[str, ...]:
    label_of = {ref.name: ref.label for ref in listing.refs}
    known = label_of.keys() | _left_out(listing)
    names: list[str] = []
    with open_text(path, newline="") as file:
        first = file.readline()
        delimiter = max(",;\t", key=first.count)
        for number, row in enumerate(csv.reader(chain([first], file), delimiter=delimiter), start=1):
            if not row or not row[0].strip():
                continue
            whole = delimiter.join(row).strip()
            if whole in known:  # names of AVE hold a class's name, which may hold a comma
                row = [whole]
            given = row[0].strip()
            name = given if given in known else Path(given).stem
            label = row[1].strip() if len(row) > 1 else ""
            if name not in known:
                if number == 1 and label not in listing.classes:
                    continue  # the header
                raise ValueError(f"{path.name}:{number}: the data set has no clip '{name}'")
            expected = label_of.get(name)
            if label in listing.classes and expected is not None and listing.classes.index(label) != expected:
                raise ValueError(f"{path.name}:{number}: {name} is labelled {label}, its name says otherwise")
            names.append(name)
    if not names:
        raise ValueError(f"{path.name} names no clip")
    return tuple(dict.fromkeys(names))
