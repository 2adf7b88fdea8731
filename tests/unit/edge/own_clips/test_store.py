"""The store of own clips: bounded, private, and in the hands of the person."""

import os
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.media.decode import decode
from isthmus.data.transforms import InputSpec
from isthmus.edge.own_clips.store import ClipStore, Limits, StoredSelection, person_folder
from isthmus.proto.errors import InvalidInput, StorageFull

SPEC = InputSpec(duration_s=1.0, spectrogram_bins=65, spectrogram_columns=60, frame_px=32, stored_px=36)
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)
PICTURES = [np.full((51, 51, 3), 20 * number, np.uint8) for number in range(10)]


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def store(tmp_path: Path, clock: Clock | None = None, **limits: float) -> ClipStore:
    return ClipStore(tmp_path / "clips", Limits(**limits), clock=clock or Clock())  # type: ignore[arg-type]


def test_a_stored_clip_decodes_like_any_other(tmp_path: Path) -> None:
    mine = store(tmp_path)
    for sound, pictures in ((TONE, PICTURES), (TONE, None), (None, PICTURES)):
        mine.add(sound, pictures, SPEC)
    both, heard, seen = (decode(ref, SPEC) for ref in mine.refs())
    assert both.spectrogram_FT is not None and both.frames_KHWC is not None
    assert heard.frames_KHWC is None and seen.spectrogram_FT is None
    assert heard.spectrogram_FT is not None
    np.testing.assert_allclose(both.spectrogram_FT, heard.spectrogram_FT)
    brightness = both.frames_KHWC.mean(axis=(1, 2, 3))
    assert (np.diff(brightness) > 5).all(), "pictures in their order"
    with pytest.raises(InvalidInput):
        mine.add(None, None, SPEC)


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    os.umask(0o022)
    mine = store(tmp_path)
    mine.add(TONE, PICTURES, SPEC)
    assert mine.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in mine.folder.iterdir()} == {0o600}


def test_it_is_bounded_in_count_bytes_and_age(tmp_path: Path) -> None:
    clock = Clock()
    mine = store(tmp_path, clock, clips=3)
    names = [mine.add(TONE, None, SPEC) for _ in range(5)]
    assert [clip.name for clip in mine.clips()] == names[2:]
    size = mine.clips()[0].size_bytes
    small = store(tmp_path, clock, bytes=2.5 * size)
    small.tidy()
    assert [clip.name for clip in small.clips()] == names[3:]
    old = store(tmp_path, clock, age_s=3_600)
    clock.now_s += 7_200
    new = old.add(TONE, None, SPEC)
    assert [clip.name for clip in old.clips()] == [new]


def test_a_kept_clip_outlives_its_time_but_not_its_owner(tmp_path: Path) -> None:
    clock = Clock()
    mine = store(tmp_path, clock, clips=2)
    kept = mine.add(TONE, None, SPEC)
    mine.keep(kept)
    clock.now_s += 30 * 86_400
    others = [mine.add(TONE, None, SPEC) for _ in range(3)]
    assert [clip.name for clip in mine.clips()] == [kept, others[-1]]
    assert mine.delete([kept]) == 1
    assert not list(mine.folder.glob(f"{kept}*"))
    with pytest.raises(InvalidInput, match="there is no clip"):
        mine.delete([kept])
    with pytest.raises(InvalidInput, match="there is no clip"):
        mine.keep("../agent")
    assert mine.delete_all() == 1
    assert list(mine.folder.iterdir()) == []


def test_what_a_kill_leaves_is_no_clip_and_is_swept_away(tmp_path: Path) -> None:
    clock = Clock()
    mine = store(tmp_path, clock)
    whole = mine.add(TONE, PICTURES, SPEC)
    for name in (
        "20260101T000000-000.wav",
        "20260101T000001-000.mp4.part",
        "nonsense.json",
        "20260101T000002-000.json",
    ):
        (mine.folder / name).write_bytes(b"{")
        os.utime(mine.folder / name, (1.0, 1.0))
    (mine.folder / "20260101T000003-000.json").write_text('{"captured_s": "x", "sound": 1, "picture": true}')
    assert [clip.name for clip in mine.clips()] == [whole]
    mine.tidy()
    left = {path.name for path in mine.folder.iterdir()}
    assert left == {f"{whole}{end}" for end in (".json", ".wav", ".mp4")}


def test_a_clock_that_jumps_back_and_forth_loses_no_young_clip(tmp_path: Path) -> None:
    clock = Clock()
    mine = store(tmp_path, clock)
    first = mine.add(TONE, None, SPEC)
    clock.now_s -= 86_400
    second = mine.add(TONE, None, SPEC)
    clock.now_s += 2 * 86_400
    third = mine.add(TONE, None, SPEC)
    assert {clip.name for clip in mine.clips()} == {first, second, third}


def test_two_clips_of_one_moment_have_two_names(tmp_path: Path) -> None:
    clock = Clock()
    mine = ClipStore(tmp_path, clock=lambda: clock.now_s)
    assert len({mine.add(TONE, None, SPEC) for _ in range(3)}) == 3


def test_pausing_lasts_until_it_is_ended(tmp_path: Path) -> None:
    mine = store(tmp_path)
    mine.pause()
    mine.pause()
    assert store(tmp_path).paused
    mine.delete_all()
    assert mine.paused, "deleting everything does not start the camera again"
    mine.resume()
    mine.resume()
    assert not store(tmp_path).paused


def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = store(tmp_path)
    kept = mine.add(TONE, None, SPEC)

    def full(*values: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isthmus.edge.own_clips.store.write_mp4", full)
    with pytest.raises(StorageFull):
        mine.add(TONE, PICTURES, SPEC)
    assert [clip.name for clip in mine.clips()] == [kept]


def test_the_selection_sees_what_is_there_now(tmp_path: Path) -> None:
    mine = store(tmp_path)
    selection = StoredSelection(mine)
    assert len(selection) == 0 and list(selection) == []
    names = [mine.add(TONE, None, SPEC) for _ in range(3)]
    assert [ref.name for ref in selection] == names
    assert [ref.name for ref in selection[:2]] == names[:2] and selection[-1].name == names[-1]
    assert all(ref.label is None for ref in selection)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "Zoë", "-a", "x" * 33, "a b"])
def test_a_person_is_a_plain_word(name: str) -> None:
    with pytest.raises(InvalidInput, match="--person"):
        person_folder(Path("state"), name)
    assert person_folder(Path("state"), "anna-2") == Path("state/people/anna-2")
