"""A voice, a face, or nobody: on invented voices and faces, noise, silence and a dark room."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from isthmus.data.synthetic.face import Face, film
from isthmus.data.synthetic.voice import RATE_HZ, Voice, speak
from isthmus.edge.capture import gates
from isthmus.edge.capture.gates import (
    SEARCHED_AGAIN,
    FaceGate,
    find_voice_gate,
    framed,
    resampled,
    voice_by_energy,
)
from tests.rigs.edge.scene import faces

CUES = np.zeros(6)


def voice(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return speak(Voice.draw(rng), CUES, ["a", "i", "u", "a"], rng, snr_db=25)


def face(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return film(Face.draw(rng), CUES, np.full(4, 0.3), rng, grain=2.0, unrest=0.0)


def in_a_room(pictures: np.ndarray, left: int, top: int) -> list[np.ndarray]:
    """Put a face into a larger picture of a dull room."""
    room = np.random.default_rng(1).normal(120, 2, (len(pictures), 360, 480, 3)).clip(0, 255).astype(np.uint8)
    room[:, top : top + 160, left : left + 160] = pictures
    return list(room)


def test_voices_are_heard_and_silence_and_noise_are_not() -> None:
    rng = np.random.default_rng(0)
    assert all(voice_by_energy(voice(seed), RATE_HZ) for seed in range(5))
    assert not voice_by_energy(np.zeros(48_000, np.float32), RATE_HZ)
    assert not voice_by_energy(rng.normal(0, 0.05, 48_000).astype(np.float32), RATE_HZ), "a fan"
    assert not voice_by_energy((0.001 * voice()).astype(np.float32), RATE_HZ), "far below hearing"
    assert not voice_by_energy(np.zeros(3, np.float32), RATE_HZ)
    click = rng.normal(0, 0.003, 48_000).astype(np.float32)
    click[20_000:20_800] += 0.5
    assert not voice_by_energy(click, RATE_HZ), "a door"


def seed_with_a_face(gate: FaceGate) -> int:
    """The cascade knows photographs; it finds most of the drawn faces, not all."""
    return next(seed for seed in range(20) if gate.faces(in_a_room(face(seed), 100, 100)[0]))


def test_a_face_is_found_and_framed() -> None:
    gate = FaceGate()
    pictures = in_a_room(face(seed_with_a_face(gate)), 100, 100)
    box = gate.find(pictures)
    assert box is not None
    centre = (box[0] + box[2] / 2, box[1] + box[3] / 2)
    assert 150 < centre[0] < 210 and 150 < centre[1] < 215
    square = framed(pictures[0], box, 1.5)
    assert square.shape[0] == square.shape[1] == pytest.approx(1.5 * box[2], abs=1)


def test_nobody_is_in_an_empty_or_a_dark_room() -> None:
    gate = FaceGate()
    empty = in_a_room(np.full((4, 160, 160, 3), 120, np.uint8), 0, 0)
    assert gate.find(empty) is None
    dark = [(each * 0.01).astype(np.uint8) for each in in_a_room(face(0), 100, 100)]
    assert gate.find(dark) is None


def test_an_empty_room_is_searched_once_and_somebody_who_comes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, searched = FaceGate(), 0
    one = face(seed_with_a_face(gate))
    rng = np.random.default_rng(0)
    room = rng.integers(100, 140, (360, 480, 3)).astype(np.uint8)
    find = gate.faces

    def counted(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        nonlocal searched
        searched += 1
        return find(picture)

    monkeypatch.setattr(gate, "faces", counted)
    for _ in range(5):  # the sensor's noise is another one in each picture
        noisy = [(room + rng.integers(0, 4, room.shape)).astype(np.uint8) for _ in range(4)]
        assert gate.find(noisy) is None
    assert searched == 1
    pictures = [np.array(room) for _ in one]
    for picture, each in zip(pictures, one, strict=True):
        picture[100 : 100 + each.shape[0], 200 : 200 + each.shape[1]] = each
    assert gate.find(pictures) is not None


def test_a_still_room_is_searched_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who keeps still, and whose face was missed, is found later."""
    gate, told = FaceGate(), [[], [(10, 20, 40, 40)]]
    monkeypatch.setattr(gate, "faces", lambda picture: told.pop(0))
    still = [np.full((240, 320, 3), 90, np.uint8)]
    assert [gate.find(still) for _ in range(SEARCHED_AGAIN + 1)] == [None] * (SEARCHED_AGAIN + 1)
    assert gate.find(still) == (10, 20, 40, 40)


def test_the_box_is_in_pixels_of_the_picture_however_large() -> None:
    import cv2

    gate = FaceGate()
    pictures = in_a_room(face(seed_with_a_face(gate)), 200, 100)
    box = gate.find(pictures)
    assert box is not None
    doubled = [cv2.resize(each, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR) for each in pictures]
    large = gate.find(doubled)
    assert large is not None
    np.testing.assert_allclose(large, [2 * each for each in box], atol=24)


def test_of_several_faces_the_largest_counts() -> None:
    import cv2

    gate = FaceGate()
    one = face(seed_with_a_face(gate))
    pictures = in_a_room(one, 300, 180)
    small = np.stack([cv2.resize(each, (110, 110)) for each in one])
    for picture, each in zip(pictures, small, strict=True):
        picture[20:130, 20:130] = each
    box = gate.find(pictures)
    assert box is not None and box[0] > 240


def test_of_three_faces_the_nearest_counts() -> None:
    gate, pictures = FaceGate(), faces(3, others=2)
    found = gate.faces(pictures[0])
    assert len(found) == 3, "all of them are seen"
    box = gate.find(list(pictures))
    assert box == gate.faces(pictures[1])[0] and box[2] > 1.5 * found[1][2]


@pytest.mark.parametrize("box", [(0, 0, 40, 40), (440, 320, 40, 40), (200, 100, 300, 300)])
def test_a_frame_at_an_edge_stays_inside_the_picture(box: tuple[int, int, int, int]) -> None:
    picture = np.zeros((360, 480, 3), np.uint8)
    height, width = framed(picture, box, 2.0).shape[:2]
    assert height == width <= 360


def test_rates_are_converted_without_changing_the_tone() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
    at_16k = resampled(tone, 44_100, 16_000)
    assert len(at_16k) == 16_000
    assert np.abs(np.fft.rfft(at_16k)).argmax() == 440
    assert resampled(tone, 16_000, 16_000) is tone


def test_silero_is_used_if_its_package_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_voice_gate() is voice_by_energy or isinstance(find_voice_gate(), gates.SileroGate)
    package = tmp_path / "silero_vad"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it would import torch')\n")
    (package / "data" / "silero_vad.onnx").write_bytes(b"model")
    opened: list[str] = []

    class Session:
        """Answers like Silero's network: sure of a voice if the part is loud."""

        def __init__(self, path: str, **options: object) -> None:
            opened.append(path)

        def run(self, outputs: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert inputs["input"].shape == (1, 576) and inputs["state"].shape == (2, 1, 128)
            assert int(inputs["sr"]) == 16_000
            loud = float(np.abs(inputs["input"]).max() > 0.05)
            return [np.array([[loud]], np.float32), inputs["state"] + 1]

    runtime = SimpleNamespace(InferenceSession=Session, SessionOptions=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)
    gate = find_voice_gate()
    assert opened == [str(package / "data" / "silero_vad.onnx")]
    assert gate(voice(), RATE_HZ)
    assert not gate(np.zeros(48_000, np.float32), 48_000)


@pytest.mark.parametrize(("rate_hz", "wanted_hz"), [(44_100, 16_000), (48_000, 16_000), (8_000, 16_000)])
def test_another_rate_keeps_time_and_level(rate_hz: int, wanted_hz: int) -> None:
    """A click stays where it was, to a tenth of a millisecond."""
    samples_T = np.zeros(rate_hz, np.float32)
    samples_T[rate_hz // 2 - 20 : rate_hz // 2 + 20] = np.hanning(40)
    found_T = resampled(samples_T, rate_hz, wanted_hz)
    assert len(found_T) == wanted_hz and found_T.dtype == np.float32
    middle_s = float((found_T * np.arange(wanted_hz)).sum() / found_T.sum()) / wanted_hz
    assert middle_s == pytest.approx(0.5, abs=1e-4)
    assert found_T.sum() / wanted_hz == pytest.approx(samples_T.sum() / rate_hz, rel=0.01)
