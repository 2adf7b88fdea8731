"""The decoded cache: equal content is decoded once, a kill loses nothing, damage and full disks are reported."""

import errno
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.cache import build
from isthmus.data.cache.build import CacheFull, build_arrays
from isthmus.data.cache.read import ClipArrays, PickedRows
from isthmus.data.clip import ClipRef, DecodedClip, Listing
from isthmus.data.layouts.listing import read_listing
from isthmus.data.media.decode import decode
from isthmus.data.synthetic.sets import make_crema_d
from isthmus.data.transforms import InputSpec

SPEC = InputSpec(spectrogram_bins=32, spectrogram_columns=32, stored_px=24, frame_px=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    make_crema_d(root / "set", actors=1, takes=1, seed=0, difficulty=0.5, progress=False)
    return root / "set"


@pytest.fixture
def listing(made: Path) -> Listing:
    return read_listing(made)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the names of the clips that were really decoded."""
    names: list[str] = []

    def counting(ref: ClipRef, spec: InputSpec) -> DecodedClip:
        names.append(ref.name)
        return decode(ref, spec)

    monkeypatch.setattr(build, "decode", counting)
    yield names


def test_rows_are_the_decoded_clips(listing: Listing, tmp_path: Path) -> None:
    made = build_arrays(listing, listing.classes, SPEC, tmp_path, progress=False)
    assert len(made) == 6
    assert made.names == tuple(ref.name for ref in listing.refs)
    assert made.labels_N.tolist() == [ref.label for ref in listing.refs]
    assert made.labels_N.dtype == np.int64
    assert set(made.actors) == {"1001"}
    assert isinstance(made.spectrograms_NFT, np.memmap)
    assert made.spectrograms_NFT.shape == (6, 32, 32)
    assert made.frames_NKHWC.shape == (6, 10, 24, 24, 3)
    for row, ref in enumerate(listing.refs):
        expected = decode(ref, SPEC)
        np.testing.assert_array_equal(made.spectrograms_NFT[row], expected.spectrogram_FT)
        np.testing.assert_array_equal(made.frames_NKHWC[row], expected.frames_KHWC)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


def test_the_same_content_is_decoded_once(listing: Listing, made: Path, tmp_path: Path, decoded: list[str]) -> None:
    first = build_arrays(listing, listing.classes, SPEC, tmp_path, progress=False)
    assert len(decoded) == 6
    again = build_arrays(listing, listing.classes, SPEC, tmp_path, progress=False)
    part = build_arrays(listing.refs[2:4], listing.classes, SPEC, tmp_path, progress=False)
    shutil.copytree(made, tmp_path / "copy")
    moved = build_arrays(read_listing(tmp_path / "copy"), listing.classes, SPEC, tmp_path / "cache2", progress=False)
    assert again.folder == first.folder
    assert part.names == first.names[2:4]
    np.testing.assert_array_equal(part.frames_NKHWC, first.frames_NKHWC[2:4])
    assert moved.content_hash == first.content_hash != part.content_hash
    assert len(decoded) == 12  # only the second, empty cache decoded
    other = build_arrays(listing.refs, listing.classes, InputSpec(stored_px=20, frame_px=16), tmp_path, progress=False)
    assert len(decoded) == 18
    assert other.content_hash != first.content_hash


def test_changed_content_is_decoded_again(made: Path, tmp_path: Path, decoded: list[str]) -> None:
    shutil.copytree(made, tmp_path / "set")
    before = build_arrays(read_listing(tmp_path / "set"), ("NEU",), SPEC, tmp_path / "cache", progress=False)
    wav = tmp_path / "set/AudioWAV/1001_DFA_ANG_XX.wav"
    shutil.copy(tmp_path / "set/AudioWAV/1001_DFA_SAD_XX.wav", wav)
    decoded.clear()
    after = build_arrays(read_listing(tmp_path / "set"), ("NEU",), SPEC, tmp_path / "cache", progress=False)
    assert decoded == ["1001_DFA_ANG_XX"]
    assert after.content_hash != before.content_hash


def test_damaged_clips_are_skipped_named_and_counted(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "set")
    flv = tmp_path / "set/VideoFlash/1001_DFA_FEA_XX.flv"
    flv.write_bytes(flv.read_bytes()[:4_000])
    (tmp_path / "set/AudioWAV/1001_DFA_SAD_XX.wav").write_bytes(b"")
    (tmp_path / "set/AudioWAV/notes.wav").write_bytes(b"")
    listing = read_listing(tmp_path / "set")
    built = build_arrays(listing, listing.classes, SPEC, tmp_path / "cache", progress=False)
    assert len(built) == 4
    assert [damage.name for damage in built.skipped] == ["notes", "1001_DFA_FEA_XX", "1001_DFA_SAD_XX"]
    assert "truncated" in built.skipped[1].reason
    assert "empty" in built.skipped[2].reason
    healthy = next(ref for ref in listing.refs if ref.name == "1001_DFA_HAP_XX")
    row = built.names.index(healthy.name)
    np.testing.assert_array_equal(built.frames_NKHWC[row], decode(healthy, SPEC).frames_KHWC)
    assert built.indices(["1001_DFA_SAD_XX", healthy.name]).tolist() == [row]
    with pytest.raises(ValueError, match="none of 2 clips can be decoded"):
        broken = [ref for ref in listing.refs if ref.name in ("1001_DFA_FEA_XX", "1001_DFA_SAD_XX")]
        build_arrays(broken, listing.classes, SPEC, tmp_path / "cache3", progress=False)


_KILLED_AT_CLIP_FIVE = """
import os, signal, sys
from pathlib import Path
from isthmus.data.cache import build
from isthmus.data.layouts.listing import read_listing
from isthmus.data.transforms import InputSpec

root, cache, spec = sys.argv[1:]
real, seen = build.decode, []

def deadly(ref, spec):
    seen.append(ref.name)
    if len(seen) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(ref, spec)

build.decode, build.BATCH = deadly, 2
listing = read_listing(Path(root))
build.build_arrays(listing, listing.classes, InputSpec.from_json(spec), Path(cache), progress=False, workers=1)
"""


def test_a_build_killed_half_way_goes_on(
    listing: Listing, made: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_arrays(listing, listing.classes, SPEC, tmp_path / "whole", progress=False)
    cache = tmp_path / "killed"
    command = [sys.executable, "-c", _KILLED_AT_CLIP_FIVE, str(made), str(cache), SPEC.to_json()]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    partial = next(cache.glob("*.partial"))
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"key": "torn')  # as a power cut leaves it
    with (partial / "frames.u8").open("ab") as frames:
        frames.write(b"half a row")
    decoded.clear()
    monkeypatch.setattr(build, "BATCH", 2)
    resumed = build_arrays(listing, listing.classes, SPEC, cache, progress=False)
    assert sorted(decoded) == [ref.name for ref in listing.refs[4:]]
    assert resumed.content_hash == whole.content_hash
    np.testing.assert_array_equal(resumed.spectrograms_NFT, whole.spectrograms_NFT)
    np.testing.assert_array_equal(resumed.frames_NKHWC, whole.frames_NKHWC)
    assert not list(cache.glob("*.partial"))


def test_a_full_disk_is_said_plainly_and_keeps_the_work(
    listing: Listing, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BATCH", 2)
    real, calls = build._sync, []

    def full_at_the_second_batch(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(build, "_sync", full_at_the_second_batch)
    with pytest.raises(CacheFull, match=r"4 of 6 clips still need .* Free some space"):
        build_arrays(listing, listing.classes, SPEC, tmp_path, progress=False)
    monkeypatch.setattr(build, "_sync", real)
    decoded.clear()
    assert len(build_arrays(listing, listing.classes, SPEC, tmp_path, progress=False)) == 6
    assert len(decoded) == 4


def test_two_builders_of_the_same_clips_decode_them_once(listing: Listing, tmp_path: Path, decoded: list[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build_arrays, listing, listing.classes, SPEC, tmp_path, progress=False) for _ in range(2)]
        folders = {build.result().folder for build in builds}
    assert len(folders) == 1
    assert len(decoded) == 6


def test_subsets_show_the_chosen_rows_without_copying(listing: Listing, tmp_path: Path) -> None:
    whole = build_arrays(listing, listing.classes, SPEC, tmp_path, progress=False)
    neighbours, picked = whole.subset([1, 2, 3]), whole.subset(np.array([5, 0, 3]))
    assert np.shares_memory(np.asarray(neighbours.frames_NKHWC), np.asarray(whole.frames_NKHWC))
    assert isinstance(picked.frames_NKHWC, PickedRows)
    assert picked.frames_NKHWC.shape == (3, 10, 24, 24, 3)
    assert picked.names == (whole.names[5], whole.names[0], whole.names[3])
    np.testing.assert_array_equal(picked.frames_NKHWC, whole.frames_NKHWC[[5, 0, 3]])
    np.testing.assert_array_equal(picked.frames_NKHWC[1][[2, 7]], whole.frames_NKHWC[0][[2, 7]])
    np.testing.assert_array_equal(picked.spectrograms_NFT[1:3], whole.spectrograms_NFT[[0, 3]])
    np.testing.assert_array_equal(picked.subset([2, 0]).labels_N, whole.labels_N[[3, 5]])
    np.testing.assert_array_equal(picked.subset([2, 0]).frames_NKHWC[0], whole.frames_NKHWC[3])
    assert picked.content_hash != whole.content_hash == whole.subset(range(6)).content_hash
    with pytest.raises(IndexError, match="outside"):
        whole.subset([6])
    with pytest.raises(ValueError, match="at least one"):
        whole.subset([])
    with pytest.raises(ValueError, match="no folder of its own"):
        _ = picked.folder
    with pytest.raises(KeyError):
        whole.indices(["1001_DFA_ANG_HI"])


def test_opening_what_is_no_cache_or_is_cut(listing: Listing, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no decoded clips"):
        ClipArrays.open(tmp_path)
    folder = build_arrays(listing, listing.classes, SPEC, tmp_path, progress=False).folder
    frames = folder / "frames.u8"
    frames.write_bytes(frames.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes instead of"):
        ClipArrays.open(folder)
    (folder / "clips.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="another format"):
        ClipArrays.open(folder)


def test_a_clip_with_one_modality_gets_no_row_and_the_cache_says_why(listing: Listing, tmp_path: Path) -> None:
    healthy = listing.refs[0]
    heard = replace(healthy, name="heard", video_path=None)
    built = build_arrays([heard, healthy], ("NEU",), SPEC, tmp_path / "cache", progress=False)
    assert built.names == (healthy.name,)
    assert [(each.name, each.reason) for each in built.skipped] == [
        ("heard", "it has no picture: the cache holds whole clips")
    ]
