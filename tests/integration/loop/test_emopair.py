"""Reading EmoPair, real speech and faces in CREMA-D's layout."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from isthmus.data.cache.build import build_arrays
from isthmus.data.layouts.listing import read_listing
from isthmus.data.splits import by_actor
from isthmus.data.transforms import InputSpec

pytestmark = pytest.mark.real_data


def test_every_clip_is_listed_with_class_and_actor(emopair: Path) -> None:
    listing = read_listing(emopair)
    assert listing.layout == "crema-d"
    assert len(listing.refs) == 938
    assert listing.damaged == ()
    with (emopair / "manifest.csv").open(newline="") as file:
        emotion_of = {row["clip"]: row["emotion"] for row in csv.DictReader(file)}
    assert {ref.name: listing.classes[ref.label or 0] for ref in listing.refs} == emotion_of
    assert len(Counter(emotion_of.values())) == 6
    split = by_actor(listing, ["1013", "1014"])
    assert len(split.public) == 714
    assert {client: len(names) for client, names in split.clients.items()} == {"1013": 102, "1014": 122}


def test_clips_of_every_actor_and_class_decode(emopair: Path, tmp_path: Path) -> None:
    listing = read_listing(emopair)
    chosen = list({(ref.actor, ref.label): ref for ref in listing.refs}.values())
    built = build_arrays(chosen, listing.classes, InputSpec(stored_px=64, frame_px=64), tmp_path, progress=False)
    assert built.skipped == ()
    assert built.spectrograms_NFT.shape == (len(chosen), 257, 299)
    assert built.frames_NKHWC.shape == (len(chosen), 10, 64, 64, 3)
    assert np.isfinite(built.spectrograms_NFT).all()
    # The hand-held camera moves: first and last frame differ, neighbours less so.
    frames = np.asarray(built.frames_NKHWC, np.float32)
    far = np.abs(frames[:, 9] - frames[:, 0]).mean()
    near = np.abs(np.diff(frames, axis=1)).mean()
    assert far > near > 0
