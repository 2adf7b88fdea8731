"""Records pass through a pipe unchanged, and bytes that are none are refused before memory is taken."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.capture.assembly import Block, StampedPicture
from isthmus.edge.capture.records import BadRecord, Note, Source, packed, read_record


def test_records_come_out_as_they_went_in() -> None:
    picture = StampedPicture(1.5, np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    block = Block(2.5, 16_000, np.linspace(-1, 1, 100, dtype=np.float32))
    note = Note(Source.MICROPHONE, "pulled out é")
    pipe = io.BytesIO(b"".join(map(packed, (picture, block, note, Note(Source.CAMERA, "x" * 9_999)))))
    seen, heard, said, long = (read_record(pipe) for _ in range(4))
    assert isinstance(seen, StampedPicture) and (seen.picture_HWC == picture.picture_HWC).all() and seen.at_s == 1.5
    assert isinstance(heard, Block) and (heard.samples_T == block.samples_T).all() and heard.rate_hz == 16_000
    assert said == note
    assert isinstance(long, Note) and len(long.text) == 500
    assert read_record(pipe) is None


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_no_bytes_do_more_than_be_refused(raw: bytes) -> None:
    pipe = io.BytesIO(raw)
    try:
        while read_record(pipe) is not None:
            pass
    except BadRecord:
        pass


@pytest.mark.parametrize("place", [0, 9, 13])
def test_a_record_that_contradicts_itself_is_refused(place: int) -> None:
    raw = bytearray(packed(StampedPicture(1.0, np.zeros((4, 5, 3), np.uint8))))
    raw[place] ^= 0x21
    with pytest.raises(BadRecord):
        read_record(io.BytesIO(bytes(raw)))


def test_samples_that_are_no_numbers_and_huge_records_are_refused() -> None:
    nan = packed(Block(1.0, 16_000, np.array([np.nan], np.float32)))
    with pytest.raises(BadRecord):
        read_record(io.BytesIO(nan))
    huge = bytearray(nan)
    huge[17:21] = (1 << 30).to_bytes(4, "little")
    with pytest.raises(BadRecord, match="1073741824 bytes"):
        read_record(io.BytesIO(bytes(huge)))
