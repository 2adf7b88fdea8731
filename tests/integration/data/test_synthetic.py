"""Synthetic sets: read by the same readers, repeatable byte for byte, and with cues that show the class."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from isthmus.data.layouts import ave
from isthmus.data.layouts.listing import read_listing
from isthmus.data.media.decode import decode
from isthmus.data.synthetic.face import film
from isthmus.data.synthetic.sets import MEASURED, Actor, Guest, People, make_ave, make_crema_d
from isthmus.data.synthetic.voice import speak
from isthmus.data.transforms import InputSpec

SPEC = InputSpec(stored_px=32, frame_px=32)


def _contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_crema_d_layout_is_complete_and_repeatable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_crema_d(tmp_path / name, actors=1, takes=2, seed=7, difficulty=0.5, progress=False)
    make_crema_d(tmp_path / "c", actors=1, takes=1, seed=8, difficulty=0.5, progress=False)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert not set(_contents(tmp_path / "a").values()) & set(_contents(tmp_path / "c").values())
    listing = read_listing(tmp_path / "a")
    assert listing.layout == "crema-d"
    assert listing.damaged == ()
    assert len(listing.refs) == 12
    assert sorted({ref.label for ref in listing.refs if ref.label is not None}) == list(range(6))
    for ref in listing.refs[:3]:
        decoded = decode(ref, SPEC)
        assert decoded.spectrogram_FT.shape == (257, 299)
        assert decoded.frames_KHWC.std() > 10
    assert json.loads((tmp_path / "a/synthetic.json").read_text())["synthetic"] is True


def test_ave_layout_is_complete_and_repeatable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_ave(tmp_path / name, classes=4, takes=3, seed=7, difficulty=0.5, progress=False)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    listing = read_listing(tmp_path / "a")
    assert listing.layout == "ave"
    assert listing.damaged == ()
    assert len(listing.classes) == 4
    assert len({ref.video_path for ref in listing.refs}) == 12
    assert len(listing.refs) == 13  # one video carries two categories
    assert (tmp_path / "a" / ave.ANNOTATIONS).read_text().startswith("Category&VideoID&Quality&StartTime&EndTime\n")
    lists = ave.read_lists(tmp_path / "a")
    assert sum(map(len, lists.values())) == 13
    spec = InputSpec(duration_s=10.0, spectrogram_columns=1004, stored_px=32, frame_px=32)
    assert decode(listing.refs[0], spec).spectrogram_FT.shape == (257, 1004)


def test_an_interrupted_set_is_completed_and_another_is_not_mixed_in(tmp_path: Path) -> None:
    make_crema_d(tmp_path, actors=1, takes=1, seed=7, difficulty=0.5, progress=False)
    before = _contents(tmp_path)
    (tmp_path / "AudioWAV/1001_DFA_SAD_XX.wav").unlink()
    make_crema_d(tmp_path, actors=1, takes=1, seed=7, difficulty=0.5, progress=False)
    assert _contents(tmp_path) == before
    with pytest.raises(ValueError, match="other arguments"):
        make_crema_d(tmp_path, actors=1, takes=1, seed=8, difficulty=0.5, progress=False)
    (tmp_path / "synthetic.json").unlink()
    with pytest.raises(ValueError, match="not empty"):
        make_ave(tmp_path, classes=2, takes=3, seed=7, difficulty=0.5, progress=False)


@pytest.mark.parametrize(
    ("actors", "takes", "seed", "difficulty"), [(0, 1, 0, 0.5), (1, 49, 0, 0.5), (1, 1, -1, 0.5), (1, 1, 0, 1.1)]
)
def test_arguments_out_of_bounds(tmp_path: Path, actors: int, takes: int, seed: int, difficulty: float) -> None:
    with pytest.raises(ValueError, match=r"between|negative"):
        make_crema_d(tmp_path / "x", actors=actors, takes=takes, seed=seed, difficulty=difficulty, progress=False)
    assert not (tmp_path / "x").exists()


def test_the_voice_speaks_its_cues() -> None:
    actor = Actor.draw(0, seed=0)

    def samples(rate: float) -> int:
        cues = np.array([0, 0, 0, rate, 0, 0.0])
        return len(speak(actor.voice, cues, "aeiou", np.random.default_rng(0), snr_db=30))

    def centroid(brightness: float) -> float:
        cues = np.array([0, 0, 0, 0, brightness, 0.0])
        power_F = np.abs(np.fft.rfft(speak(actor.voice, cues, "aeiou", np.random.default_rng(0), snr_db=40))) ** 2
        return float((power_F * np.arange(len(power_F))).sum() / power_F.sum() / len(power_F))

    assert samples(-1.0) > 1.5 * samples(1.0)
    assert centroid(1.0) > centroid(-1.0)


def test_the_face_shows_its_cues_and_actors_differ() -> None:
    def picture(number: int, curve: float) -> npt.NDArray[np.float64]:
        actor = Actor.draw(number, seed=0)
        cues = np.array([0, 0, 0, curve, 0, 0.0])
        frames = film(actor.face, cues, np.zeros(12), np.random.default_rng(0), grain=0.0, unrest=0.0)
        return np.asarray(frames[-1], np.float64)

    smile, frown, other = picture(0, 1.0), picture(0, -1.0), picture(1, 1.0)
    changed_H = np.abs(smile - frown).mean(axis=(1, 2))
    assert changed_H[90:150].mean() > 5 * changed_H[:60].mean()  # the mouth moves, the hair does not
    assert np.abs(smile - other).mean() > 20


def test_actors_of_one_style_resemble_each_other() -> None:
    habits = [Actor.draw(number, seed=3).voice_habit_CV for number in range(8)]
    alike = np.mean([np.abs(habits[n] - habits[n + 4]).mean() for n in range(4)])
    unlike = np.mean([np.abs(habits[n] - habits[n + 1]).mean() for n in range(7)])
    assert alike < 0.7 * unlike


def test_a_set_of_an_earlier_version_is_completed_by_the_same_people(tmp_path: Path) -> None:
    marker = {"synthetic": True, "version": 1, "layout": "crema-d", "actors": 1, "takes": 1}
    (tmp_path / "synthetic.json").write_text(json.dumps({**marker, "seed": 7, "difficulty": 0.5}, indent=1) + "\n")
    make_crema_d(tmp_path, actors=1, takes=1, seed=7, difficulty=0.5, progress=False)
    assert len(read_listing(tmp_path).refs) == 6
    actor = Actor.draw(1, seed=7)
    habits = float(actor.voice_habit_CV[2, 1]), float(actor.face_habit_CV[3, 0])
    known = actor.voice.pitch_hz, actor.voice.tract, actor.face.head_width, *habits
    assert known == pytest.approx((139.615352, 1.044498, 40.801794, 0.020820, -0.102045), rel=1e-4), (
        "as version 0.1.0 drew"
    )


def test_people_lie_as_far_apart_as_the_knobs_say() -> None:
    def voices(people: People) -> npt.NDArray[np.float64]:
        return np.log2([Actor.draw(number, 0, people).voice.pitch_hz for number in range(12)])

    def brows(people: People) -> npt.NDArray[np.float64]:
        return np.array([Actor.draw(number, 0, people).face_habit_CV[:, 0].mean() for number in range(12)])

    assert voices(MEASURED).std() == pytest.approx(MEASURED.voices * voices(People()).std())
    assert voices(People(voices=0)).std() == pytest.approx(0)
    assert brows(People(resting=0.5)).std() > 2 * brows(People()).std()
    assert Actor.draw(3, 0, People(faces=0)).face.head_width == Actor.draw(4, 0, People(faces=0)).face.head_width
    with pytest.raises(ValueError, match="faces: 2 is not between"):
        People(faces=2)


def test_a_guest_has_clips_of_some_classes(tmp_path: Path) -> None:
    guests = [Guest((1, 3), 2)]
    make_crema_d(tmp_path, actors=1, takes=1, seed=0, difficulty=0.5, people=MEASURED, guests=guests, progress=False)
    listing = read_listing(tmp_path)
    assert sorted(ref.label for ref in listing.refs if ref.actor == "1002" and ref.label is not None) == [1, 1, 3, 3]
    assert sum(ref.actor == "1001" for ref in listing.refs) == 6
    marker = json.loads((tmp_path / "synthetic.json").read_text())
    assert (marker["people"], marker["guests"]) == (
        {"voices": 0.55, "faces": 1.0, "resting": 0.25},
        [{"classes": [1, 3], "takes": 2}],
    )
    with pytest.raises(ValueError, match="other arguments"):
        make_crema_d(tmp_path, actors=1, takes=1, seed=0, difficulty=0.5, guests=guests, progress=False)


@pytest.mark.parametrize("guest", [Guest((), 1), Guest((6,), 1), Guest((0,), 49)])
def test_a_guest_out_of_bounds_is_refused(tmp_path: Path, guest: Guest) -> None:
    with pytest.raises(ValueError, match=r"labels from 0 to 5|between"):
        make_crema_d(tmp_path / "x", actors=1, takes=1, seed=0, difficulty=0.5, guests=[guest], progress=False)
    assert not (tmp_path / "x").exists()
