"""Short versions of tests/bench/edge/faults.py: power losses, cuts of calls, and damaged frames."""

import random
from pathlib import Path
from typing import Any

import pytest

from isthmus.data.files import remove, write_atomically
from tests.rigs.edge import power_mount
from tests.rigs.edge.damaged_frames import damaged_frames
from tests.rigs.edge.power_disk import Disk, write_left
from tests.rigs.project.system import missing


def test_what_was_not_synced_may_be_lost_and_what_was_may_not(tmp_path: Path) -> None:
    disk = Disk()
    file = disk.do(["make", 1, "kept", "file", 0o600, ""])
    disk.do(["write", file, 0, b"a" * 1_000])
    disk.do(["sync", file])
    disk.do(["sync", 1])
    disk.do(["write", file, 0, b"b" * 1_000])
    later = disk.do(["make", 1, "new", "file", 0o600, ""])
    disk.do(["write", later, 0, b"c" * 1_000])
    disk.do(["rename", 1, "new", 1, "kept"])
    assert disk.after_power_loss("all", random.Random(0)) == {"/kept": ("file", 0o600, b"a" * 1_000)}
    assert disk.after_power_loss("data", random.Random(0)) == {"/kept": ("file", 0o600, b"")}
    seen = {disk.after_power_loss("random", random.Random(seed))["/kept"][2] for seed in range(60)}
    assert {b"a" * 1_000, b"", b"c" * 512} <= seen
    assert any(len(set(content)) == 2 for content in seen), "torn within the file"
    disk.do(["sync", later])
    disk.do(["sync", 1])
    left = disk.after_power_loss("random", random.Random(1))
    assert left == {"/kept": ("file", 0o600, b"c" * 1_000)}
    write_left(left, tmp_path)
    assert (tmp_path / "kept").read_bytes() == b"c" * 1_000


def needs_fuse() -> None:
    if reason := power_mount.missing():
        missing(reason)


def test_a_file_is_old_or_new_after_a_power_loss_at_any_moment(tmp_path: Path) -> None:
    needs_fuse()
    with power_mount.recorded(tmp_path) as mount:
        for content in ("first", "second"):
            write_atomically(mount / "device" / "file.json", content)
        (mount / "device" / "careless").write_text("content without a sync")
        remove(mount / "device" / "file.json")
    disk, found = Disk(), []
    for operation in power_mount.operations(tmp_path):
        disk.do(operation)
        for seed in range(8):
            left = disk.after_power_loss("random", random.Random(seed))
            found.append(left.get("/device/file.json", ("", 0, None))[2])
    assert {None, b"first", b"second"} == set(found)
    assert found[0] is None and found[-1] is None, "a deleted file does not come back"
    careless = {disk.after_power_loss("random", random.Random(seed)).get("/device/careless") for seed in range(40)}
    assert len(careless) > 1, "the file system does lose what nobody synced"


def test_a_device_goes_on_after_power_losses(tmp_path: Path) -> None:
    needs_fuse()
    from tests.rigs.edge.power_loss import a_life, cut, recorded_life

    students, plan = a_life(tmp_path)
    life = recorded_life(students, plan)
    findings = cut(life, students, plan, every=60, continue_each=2, losses=("data", "random"))
    assert not findings.faults, findings.first
    assert findings.points >= 16
    assert findings.resumed >= 5


def test_no_damaged_frame_is_accepted() -> None:
    found = damaged_frames(1_000, seed=1)
    assert found.damaged >= 1_000
    assert (found.accepted, found.refused_undamaged) == (0, 0)
    assert found.sent > found.damaged, "some frames come through whole"


@pytest.mark.parametrize("kind", ["start", "upload", "infer", "forget"])
def test_what_is_sent_over_a_link_that_is_cut_is_applied_once(kind: str, tiny_release: Any, tmp_path: Path) -> None:
    from tests.rigs.edge.cut_calls import cut_calls

    tally = cut_calls(tiny_release, tmp_path / "state", cuts=4, kinds=(kind,))
    assert not tally.faults
    assert tally.cuts[kind] >= 4
    assert tally.tries[kind] > tally.done[kind], "calls were tried again"
