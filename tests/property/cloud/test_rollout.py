"""A rollout in steps: whatever operators do in whatever order, what a device is offered is as they said."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.offers.rollout import Record, changed, max_serial, offered, position, withdrawn
from isthmus.proto.errors import InvalidInput

IDS = st.text("abcdef0123456789", min_size=1, max_size=16)
RELEASES = ("a", "b", "c")
DEVICES = tuple(f"device-{number}" for number in range(40))


@given(IDS, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_includes_every_device_of_a_smaller_one(device_id: str, one: float, two: float) -> None:
    smaller, larger = sorted((one, two))
    if Record("r", smaller, (), 1).includes(device_id):
        assert Record("r", larger, (), 1).includes(device_id)
    assert Record("r", 1.0, (), 1).includes(device_id)
    assert not Record("r", 0.0, (), 1).includes(device_id)
    assert 0 <= position(device_id, "r") < 1


@pytest.mark.parametrize("release_id", ["0123456789abcdef", "fedcba9876543210"])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
def test_about_the_share_of_the_devices_is_included(share: float, release_id: str) -> None:
    """Of n = 20,000 devices n p are expected. Five standard deviations of the binomial distribution are allowed."""
    count = 20_000
    included = sum(Record(release_id, share, (), 1).includes(f"{number:016x}") for number in range(count))
    assert abs(included - count * share) < 5 * (count * share * (1 - share)) ** 0.5


def test_another_release_goes_to_other_devices_first() -> None:
    first, second = (
        {each for each in map(str, range(2_000)) if Record(release, 0.1, (), 1).includes(each)} for release in "ab"
    )
    assert 0 < len(first & second) < 0.3 * len(first)


@dataclass(frozen=True)
class Offer:
    release: str
    share: float
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Withdraw:
    release: str


OPERATIONS = st.lists(
    st.one_of(
        st.builds(
            Offer,
            st.sampled_from(RELEASES),
            st.sampled_from((0.0, 0.1, 0.5, 1.0)),
            st.lists(st.sampled_from(DEVICES), max_size=3).map(tuple),
        ),
        st.builds(Withdraw, st.sampled_from(RELEASES)),
    ),
    max_size=12,
)


@given(OPERATIONS)
def test_the_newest_offer_that_includes_a_device_wins_and_versions_only_grow(
    operations: list[Offer | Withdraw],
) -> None:
    """Compared with the whole history, read from its end; and a device never sees a lower version than before."""
    records: tuple[Record, ...] = (Record("base", 1.0, (), 1),)
    history: list[Offer] = [Offer("base", 1.0, ())]
    seen = dict.fromkeys(DEVICES, 0)
    holds = dict.fromkeys(DEVICES, "")
    for operation in operations:
        try:
            if isinstance(operation, Offer):
                records = changed(records, operation.release, operation.share, operation.devices, above=0)
            else:
                records = withdrawn(records, operation.release, 5.0, above=0)
        except InvalidInput:
            continue
        history = [each for each in history if each.release != operation.release]
        if isinstance(operation, Offer):
            history.append(operation)
        for device in DEVICES:
            wanted = next(
                each
                for each in reversed(history)
                if device in each.devices or position(device, each.release) < each.share
            )
            got = offered(device, records)
            assert got is not None and got.release_id == wanted.release
            if got.release_id != holds[device]:
                assert got.serial > seen[device], "the device would refuse its base student as an older one"
            holds[device], seen[device] = got.release_id, max(seen[device], got.serial)
    assert len({each.serial for each in records}) == len(records)


@given(st.integers(0, 2**40))
def test_every_version_that_is_asked_for_is_above_those_that_are_known(above: int) -> None:
    records = changed([Record("a", 1.0, (), 7)], "b", 0.5, (), above=above)
    assert min(each.serial for each in records) > above
    assert max_serial(records) == next(each.serial for each in records if each.release_id == "b")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_is_a_number_from_0_to_1(share: float) -> None:
    with pytest.raises(InvalidInput, match="from 0 to 1"):
        changed([Record("a", 1.0, (), 1)], "b", share, (), above=0)


def test_an_offer_to_nobody_or_to_too_many_named_devices_is_refused() -> None:
    base = [Record("a", 1.0, (), 1)]
    with pytest.raises(InvalidInput, match="name devices"):
        changed(base, "b", 0.0, (), above=0)
    with pytest.raises(InvalidInput, match="at most 1000"):
        changed(base, "b", 0.0, map(str, range(1_001)), above=0)


def test_there_is_always_a_release_for_everyone() -> None:
    base = [Record("a", 1.0, (), 1)]
    with pytest.raises(InvalidInput, match="--everyone"):
        withdrawn(base, "a", 1.0, above=0)
    with pytest.raises(InvalidInput, match="--everyone"):
        changed(base, "a", 0.5, (), above=0)
    with pytest.raises(InvalidInput, match="--everyone"):
        changed([], "a", 0.5, (), above=0)
    with pytest.raises(InvalidInput, match="offered to nobody"):
        withdrawn(base, "b", 1.0, above=0)
    both = changed(base, "b", 1.0, (), above=0)
    gone = withdrawn(both, "b", 9.0, above=0)
    assert withdrawn(gone, "b", 10.0, above=0) == gone, "twice is as good as once"
    again = offered("any", gone)
    assert again is not None and again.release_id == "a"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (Record("r", 1.0, (), 1), "everyone"),
        (Record("r", 0.05, (), 1), "5 %"),
        (Record("r", 0.001, ("x", "y"), 1), "0.1 % and 2 named"),
        (Record("r", 0.0, ("x",), 1), "1 named"),
        (Record("r", 0.0, (), 1, 5.0), "withdrawn"),
    ],
)
def test_to_whom_a_release_is_offered_in_words(record: Record, words: str) -> None:
    assert record.shown == words
