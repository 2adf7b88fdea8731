"""Feature frames: the round trip stays within the bound of its number type; no changed byte goes unnoticed."""

import contextlib

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.proto.codec import frame_bytes, pack_frame, unpack_frame
from isthmus.proto.errors import BadFrame
from isthmus.proto.messages import Captured, FeatureFrame, Features, NumberType, compressed_width

WIDTH = 24
RATIOS = (1.0, 1.5, 2.0, 3.0)
FLOAT32_LARGEST = float(np.finfo(np.float32).max)
LARGEST = {NumberType.FP32: FLOAT32_LARGEST, NumberType.FP16: 65_504.0, NumberType.INT8: 2.0**127}


@st.composite
def frames(draw: st.DrawFn) -> FeatureFrame:
    number_type = draw(st.sampled_from(NumberType))
    ratio = draw(st.sampled_from(RATIOS))
    largest = LARGEST[number_type]
    values = st.floats(-largest, largest, width=32)
    width = compressed_width(WIDTH, ratio)
    captured = draw(st.sampled_from(Captured))
    audio_W, visual_W = (
        None if captured is absent_in else draw(hnp.arrays(np.float32, width, elements=values))
        for absent_in in (Captured.PICTURE, Captured.SOUND)
    )
    return FeatureFrame(Features(audio_W, visual_W), ratio, number_type)


def bound_W(values_W: npt.NDArray[np.float32], number_type: NumberType) -> npt.NDArray[np.float64]:
    wide_W = np.abs(values_W.astype(np.float64))
    match number_type:
        case NumberType.FP32:
            return np.zeros_like(wide_W)
        case NumberType.FP16:
            return np.maximum(wide_W * 2.0**-11, 2.0**-25)
        case NumberType.INT8:
            # Half a step; the scale is a float32 rounded up (for the smallest numbers by a whole subnormal step).
            step = wide_W.max() / 127 * (1 + 2.0**-22) + 2.0**-149
            return np.full_like(wide_W, step / 2 * (1 + 1e-6) + wide_W.max() * 2.0**-23 + 2.0**-149)


@given(frames())
def test_round_trip_is_within_the_bound(frame: FeatureFrame) -> None:
    read = unpack_frame(pack_frame(frame), feature_width=WIDTH, ratios=RATIOS)
    assert (read.ratio, read.number_type) == (frame.ratio, frame.number_type)
    assert read.features.captured is frame.features.captured
    for sent_W, read_W in (
        (frame.features.audio_D, read.features.audio_D),
        (frame.features.visual_D, read.features.visual_D),
    ):
        if sent_W is None or read_W is None:
            continue
        error_W = np.abs(sent_W.astype(np.float64) - read_W)
        assert (error_W <= bound_W(sent_W, frame.number_type)).all()


@given(frames())
def test_a_frame_is_as_long_as_predicted_and_an_absent_vector_takes_no_bytes(frame: FeatureFrame) -> None:
    vectors = 2 if frame.features.captured is Captured.BOTH else 1
    assert len(pack_frame(frame)) == frame_bytes(WIDTH, frame.ratio, frame.number_type, vectors=vectors)


@given(frames(), st.data())
def test_any_changed_byte_is_refused(frame: FeatureFrame, data: st.DataObject) -> None:
    packed = bytearray(pack_frame(frame))
    position = data.draw(st.integers(0, len(packed) - 1))
    packed[position] ^= data.draw(st.integers(1, 255))
    refused = False
    try:
        unpack_frame(bytes(packed), feature_width=WIDTH, ratios=RATIOS)
    except BadFrame:
        refused = True
    assert refused


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_at_most_bad_frame(noise: bytes) -> None:
    read = None
    with contextlib.suppress(BadFrame):
        read = unpack_frame(b"ISTF" + noise, feature_width=WIDTH, ratios=RATIOS)
    assert read is None or np.isfinite(read.features.filled()).all()
