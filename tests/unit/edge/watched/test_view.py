"""A look at camera and microphone: what is there, how big it is, and that two looks share one result."""

import base64
from typing import cast

import cv2
import numpy as np
import pytest

from isthmus.data.transforms import InputSpec
from isthmus.edge.capture.assembly import Block, StampedPicture
from isthmus.edge.capture.process import Capture
from isthmus.edge.watched import view
from isthmus.edge.watched.view import LiveView, shown_levels

SPEC = InputSpec(duration_s=1.0, spectrogram_bins=65, spectrogram_columns=60, frame_px=32, stored_px=36)


class Sources:
    """What a capture has of the last seconds."""

    def __init__(self, blocks: list[Block], picture: StampedPicture | None) -> None:
        self.blocks, self.picture, self.asked = blocks, picture, 0

    def recent(self) -> tuple[list[Block], StampedPicture | None]:
        self.asked += 1
        return self.blocks, self.picture


def looking(sources: Sources, now_s: list[float]) -> LiveView:
    return LiveView(cast(Capture, sources), SPEC, lambda: now_s[0])


def test_nothing_is_shown_of_a_source_that_gives_nothing() -> None:
    assert looking(Sources([], None), [0.0]).look() == {"picture": None, "sound": None}


def test_picture_and_sound_are_shown_in_their_sizes() -> None:
    picture_HWC = np.full((60, 80, 3), (200, 20, 20), np.uint8)
    tone_T = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000).astype(np.float32)
    look = looking(Sources([Block(0.0, 16_000, tone_T)], StampedPicture(0.9, picture_HWC)), [1.0]).look()
    assert (look["picture"]["width"], look["picture"]["height"], look["picture"]["faces"]) == (80, 60, [])
    shown_HWC = cv2.imdecode(np.frombuffer(base64.b64decode(look["picture"]["jpeg"]), np.uint8), cv2.IMREAD_COLOR)
    assert shown_HWC is not None and shown_HWC[30, 40][2] > 150 > shown_HWC[30, 40][0], "red stays red"
    levels = np.frombuffer(base64.b64decode(look["sound"]["levels"]), np.uint8)
    assert len(levels) == look["sound"]["bins"] * look["sound"]["columns"]
    loudest = levels.reshape(look["sound"]["bins"], -1).mean(axis=1).argmax()
    assert loudest < look["sound"]["bins"] / 4, "440 Hz of 8,000 is a low bin"
    assert look["sound"]["loudness"] == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


def test_two_who_look_at_once_share_one_result() -> None:
    now_s, sources = [10.0], Sources([], None)
    seen = looking(sources, now_s)
    assert seen.look() is seen.look()
    assert sources.asked == 1
    now_s[0] += 2 * view.AGAIN_S
    seen.look()
    assert sources.asked == 2


def test_levels_are_whole_bytes_and_small_enough() -> None:
    levels_FT = shown_levels(np.random.default_rng(0).normal(size=(257, 400)).astype(np.float32))
    assert levels_FT.dtype == np.uint8 and levels_FT.shape == (view.SHOWN_BINS, view.SHOWN_COLUMNS)
    assert np.unique(levels_FT).size > 50


def test_silence_is_dark_and_the_loudest_bright() -> None:
    """Most of a spectrogram of speech is as quiet as the room; the standard deviations above its mean are the voice."""
    values_FT = np.full((60, 60), -9.0, np.float32)
    values_FT[2:5, 10:30] = 4.0
    levels_FT = shown_levels(values_FT)
    assert levels_FT.min() == 0 and np.median(levels_FT) == 0 and levels_FT.max() == 255
    assert (shown_levels(np.zeros((60, 60), np.float32)) == 0).all()
