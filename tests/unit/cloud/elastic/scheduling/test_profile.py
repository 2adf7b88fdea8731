"""Profiles: interpolation, memory, JSON in both directions, and refusals."""

import json
from dataclasses import replace

import pytest

from isthmus.cloud.elastic.scheduling.profile import MAX_BATCH, BadProfile, MachineKey, Profile, paper_profile


def small() -> Profile:
    return Profile(
        key=MachineKey("cpu", "cpu", 1, "float32", "abc"),
        gammas=(-4, 0),
        sizes=(1, 4, 8),
        accuracy={"animals": {-4: 0.8, 0: 0.9}},
        latency_s={-4: (0.010, 0.016, 0.024), 0: (0.010, 0.022, 0.040)},
        memory={-4: (100, 400, 800), 0: (200, 500, 900)},
        schedules={-4: (4, 4, 0)},
    )


def test_times_are_linear_between_sizes_and_beyond() -> None:
    profile = small()
    assert profile.batch_time_s(0, 1) == pytest.approx(0.010)
    assert profile.batch_time_s(0, 2) == pytest.approx(0.014)
    assert profile.batch_time_s(0, 6) == pytest.approx(0.031)
    assert profile.batch_time_s(0, 16) == pytest.approx(0.076)
    assert profile.times_s(0)[0] == 0 and len(profile.times_s(0)) == MAX_BATCH + 1
    with pytest.raises(ValueError, match="from 1"):
        profile.batch_time_s(0, 0)


def test_one_size_alone_scales_with_the_count() -> None:
    profile = replace(small(), sizes=(4,), latency_s={-4: (0.01,), 0: (0.02,)}, memory={})
    assert profile.batch_time_s(0, 8) == pytest.approx(0.04)
    assert profile.memory_bytes(0, 8) == 0
    assert profile.largest_batch(0, 1) == MAX_BATCH


@pytest.mark.parametrize(("limit", "fits"), [(None, 64), (10**9, 64), (900, 8), (899, 7), (500, 4), (199, 1)])
def test_the_largest_batch_within_memory(limit: int | None, fits: int) -> None:
    assert small().largest_batch(0, limit, 64) == fits


def test_the_paper_like_profile_serves_what_the_paper_says() -> None:
    profile = paper_profile()
    assert profile.capacity_per_s(0) == pytest.approx(365, abs=2)
    assert profile.batch_time_s(-20, 10) == pytest.approx(0.006 + 10 / 1330)
    assert profile.accuracy_of("CIFAR100", 8) == 0.898


def test_json_gives_the_same_profile_back() -> None:
    for profile in (small(), paper_profile(), replace(small(), merge_order="published")):
        assert Profile.from_json(profile.to_json()) == profile


def test_a_profile_without_a_merge_order_was_measured_with_the_only_one_there_was() -> None:
    raw = json.loads(small().to_json())
    del raw["merge_order"]
    assert Profile.from_json(json.dumps(raw)).merge_order == "receiving-first"
    with pytest.raises(BadProfile, match="merge_order must be one of published, receiving-first"):
        Profile.from_json(json.dumps({**raw, "merge_order": "shuffled"}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("gammas", [0, -4]),
        ("sizes", [1, 4]),
        ("sizes", [0, 4, 8]),
        ("sizes", [1, 4, MAX_BATCH + 1]),
        ("latency_s", {"0": [0.01, 0.02, 0.04]}),
        ("latency_s", {"-4": [0.01, 0.02, 0.04], "0": [0.01, 0.02, float("nan")]}),
        ("latency_s", {"-4": [0.01, 0.02, 0.04], "0": [0.01, 0.02, 0.0]}),
        ("memory", {"-4": [1, 2, 3]}),
        ("accuracy", {"animals": {"0": 0.9}}),
        ("accuracy", {"animals": {"-4": 0.8, "0": 1.5}}),
        ("accuracy", ["animals"]),
        ("schedules", {"-8": [8]}),
        ("key", None),
    ],
)
def test_what_cannot_be_is_refused(field: str, value: object) -> None:
    raw = json.loads(small().to_json())
    raw[field] = value
    with pytest.raises(BadProfile):
        Profile.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000, "x" * (5 << 20)])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(BadProfile):
        Profile.from_json(text)


def test_another_machine_is_told() -> None:
    key = small().key
    assert key.differences(key) == ()
    assert key.differences(replace(key, threads=2, device="cuda")) == (
        "device: measured with 'cpu', here 'cuda'",
        "threads: measured with 1, here 2",
    )


def test_tasks_come_and_go() -> None:
    profile = small().with_task("vehicles", {-4: 0.7, 0: 0.75})
    assert profile.accuracy_of("vehicles", 0) == 0.75
    assert profile.without_task("vehicles") == small()
    with pytest.raises(BadProfile):
        small().with_task("vehicles", {0: 0.75})


def test_a_margin_slows_every_batch_alike() -> None:
    slowed = small().slowed(1.1)
    assert slowed.batch_time_s(0, 6) == pytest.approx(1.1 * small().batch_time_s(0, 6))
    assert slowed.accuracy == small().accuracy and slowed.memory == small().memory
    with pytest.raises(BadProfile):
        small().slowed(0.0)
