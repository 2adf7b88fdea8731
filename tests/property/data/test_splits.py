"""For any data set: no clip is on two sides, none is lost, halves are exact, and a seed fixes the split."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.clip import ClipRef, Listing
from isthmus.data.splits import by_actor, by_class, latency_halves, stratified

labels_st = st.lists(st.integers(0, 5), min_size=1, max_size=80)
seeds = st.integers(0, 2**32 - 1)


def _listing(labels: list[int], actors: list[int]) -> Listing:
    refs = [
        ClipRef(f"c{n:03d}", None, None, label, str(actor))
        for n, (label, actor) in enumerate(zip(labels, actors, strict=True))
    ]
    return Listing("crema-d", ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG"), tuple(refs), ())


@given(labels=labels_st, seed=seeds, data=st.data())
def test_latency_halves(labels: list[int], seed: int, data: st.DataObject) -> None:
    names = [f"c{n:03d}" for n in range(len(labels))]
    selection, test = latency_halves(names, labels, seed)
    assert not set(selection) & set(test)
    assert sorted([*selection, *test]) == names
    label_of = dict(zip(names, labels, strict=True))
    chosen = Counter(label_of[name] for name in selection)
    for label, count in Counter(labels).items():
        assert chosen[label] == count // 2
    order = data.draw(st.permutations(range(len(labels))))
    assert latency_halves([names[n] for n in order], [labels[n] for n in order], seed) == (selection, test)


@given(labels=labels_st, share=st.floats(0.05, 0.95), seed=seeds)
def test_stratified_is_in_proportion(labels: list[int], share: float, seed: int) -> None:
    refs = _listing(labels, [0] * len(labels)).refs
    drawn = stratified(refs, share=share, seed=seed)
    assert len(set(drawn)) == len(drawn) == round(share * len(labels))
    label_of = {ref.name: ref.label for ref in refs}
    counts = Counter(label_of[name] for name in drawn)
    for label, count in Counter(labels).items():
        assert abs(counts[label] - share * count) < 1
    assert stratified(reversed(refs), share=share, seed=seed) == drawn


@given(rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=2, max_size=80), data=st.data())
def test_by_actor_is_disjoint_and_loses_nothing(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    listing = _listing([label for label, _ in rows], [actor for _, actor in rows])
    people = sorted({str(actor) for _, actor in rows})
    private = data.draw(st.lists(st.sampled_from(people), min_size=1, unique=True))
    if len(private) == len(people):
        return
    split = by_actor(listing, private)
    everyone = [*split.public, *split.private]
    assert sorted(everyone) == [ref.name for ref in listing.refs]
    actor_of = {ref.name: ref.actor for ref in listing.refs}
    assert all(actor_of[name] == client for client, names in split.clients.items() for name in names)
    assert not {actor_of[name] for name in split.public} & set(private)


@given(extra=st.lists(st.integers(0, 5), max_size=60), seed=seeds)
def test_by_class_is_disjoint_and_loses_nothing(extra: list[int], seed: int) -> None:
    labels = [label for label in range(6) for _ in range(10)] + extra
    listing = _listing(labels, [0] * len(labels))
    split = by_class(listing, seed=seed)
    assert sorted([*split.public, *split.private]) == [ref.name for ref in listing.refs]
    label_of = {ref.name: ref.label for ref in listing.refs}
    assert {label_of[name] for name in split.clients["client_1"]} <= {0, 1, 2}
    assert {label_of[name] for name in split.clients["client_2"]} <= {3, 4, 5}
    assert by_class(listing, seed=seed) == split
