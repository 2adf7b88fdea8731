"""Patches: the result is near the target, the same everywhere, and no damaged patch is applied."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.proto.errors import Corrupt, InvalidInput
from isthmus.proto.patch import Differences, Span, apply_patch, base_sha256, coding_of, make_patch

codings = st.sampled_from([Differences.INT8, Differences.FP16])
layouts = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6)), max_size=4)


def two_files(layout: list[tuple[int, int, int]], seed: int) -> tuple[bytes, bytes, list[Span]]:
    """A base and a target: for each part some bytes of structure, then ``rows`` rows of ``width`` weights."""
    rng = np.random.default_rng(seed)
    base, target, spans = b"head", b"head", []
    for gap, rows, width in layout:
        structure = rng.bytes(gap)
        base, target = base + structure, target + (rng.bytes(gap) if rng.random() < 0.5 else structure)
        spans.append(Span(len(base), rows * width, rows))
        weights_RW = rng.standard_normal((rows, width)).astype("<f4")
        base += weights_RW.tobytes()
        target += (
            (weights_RW + rng.standard_normal((rows, width)).astype("<f4") * rng.choice([0, 0.01]))
            .astype("<f4")
            .tobytes()
        )
    return base, target, spans


@given(layouts, st.integers(0, 2**32), codings, st.integers(1, 127))
def test_the_result_is_the_target_up_to_half_a_step(
    layout: list[tuple[int, int, int]], seed: int, coding: Differences, levels: int
) -> None:
    base, target, spans = two_files(layout, seed)
    patch = make_patch(base, target, spans, coding=coding, levels=levels)
    made = apply_patch(base, patch)
    assert made == apply_patch(base, patch)
    assert (base_sha256(patch), coding_of(patch)) == (hashlib.sha256(base).digest(), coding)
    inside = np.zeros(len(base), bool)
    for span in spans:
        inside[span.offset_bytes : span.offset_bytes + 4 * span.values] = True
        was, wanted, got = (
            np.frombuffer(each, "<f4", span.values, span.offset_bytes).reshape(span.rows, -1).astype(np.float64)
            for each in (base, target, made)
        )
        difference = wanted - was
        if coding is Differences.INT8:
            step = np.abs(difference).max(axis=1, keepdims=True) / levels / 2
        else:
            step = np.abs(difference) * 2.0**-11 + 2.0**-25
        assert (np.abs(got - wanted) <= step * (1 + 1e-5) + np.abs(wanted) * 2.0**-22).all()
    outside = ~inside
    assert (np.frombuffer(made, np.uint8)[outside] == np.frombuffer(target, np.uint8)[outside]).all()


@given(layouts, st.integers(0, 2**32), codings, st.data())
def test_every_cut_or_changed_byte_is_refused(
    layout: list[tuple[int, int, int]], seed: int, coding: Differences, data: st.DataObject
) -> None:
    base, target, spans = two_files(layout, seed)
    patch = make_patch(base, target, spans, coding=coding)
    for length in range(len(patch)):
        with pytest.raises(Corrupt):
            apply_patch(base, patch[:length])
    place = data.draw(st.integers(0, len(patch) - 1))
    changed = bytearray(patch)
    changed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Corrupt):
        apply_patch(base, bytes(changed))
    with pytest.raises(Corrupt):
        apply_patch(base, patch + b"x")


@given(layouts, st.integers(0, 2**32), st.integers(0, 10_000))
def test_another_base_is_refused(layout: list[tuple[int, int, int]], seed: int, place: int) -> None:
    base, target, spans = two_files(layout, seed)
    other = bytearray(base)
    other[place % len(base)] ^= 1
    patch = make_patch(base, target, spans)
    for wrong in (bytes(other), base + b"x", base[:-1], b""):
        with pytest.raises(Corrupt, match="applies to another file"):
            apply_patch(wrong, patch)


@given(st.lists(st.tuples(st.integers(0, 71), st.integers(0, 255)), min_size=1, max_size=6), st.binary(max_size=40))
def test_a_forged_patch_with_a_right_checksum_does_no_harm(changes: list[tuple[int, int]], tail: bytes) -> None:
    """Nonsense with a right checksum is refused, or gives a file of the base's size."""
    base, target, spans = two_files([(3, 2, 3), (5, 1, 4)], 0)
    forged = bytearray(make_patch(base, target, spans)[:-4])
    for place, value in changes:
        forged[place % len(forged)] = value
    sealed = bytes(forged) + tail
    try:
        made = apply_patch(base, sealed + struct.pack("<I", zlib.crc32(sealed)))
    except Corrupt:
        return
    assert len(made) == len(base)


def test_a_bomb_is_not_unpacked() -> None:
    base, target, spans = two_files([(3, 2, 3)], 0)
    patch = make_patch(base, target, spans)
    header = patch[: struct.calcsize("<4sB3s32sQIIQ")]
    sealed = header + zlib.compress(bytes(50_000_000))
    with pytest.raises(Corrupt, match="stated size"):
        apply_patch(base, sealed + struct.pack("<I", zlib.crc32(sealed)))


@pytest.mark.parametrize(
    ("target", "spans"),
    [
        (b"\0" * 15, []),
        (b"\0" * 16, [Span(0, 5)]),
        (b"\0" * 16, [Span(0, 2), Span(4, 1)]),
        (b"\0" * 16, [Span(0, 3, 2)]),
        (b"\0" * 16, [Span(0, 0)]),
        (b"\0" * 16, [Span(17, 1)]),
        (b"\0\0\xc0\x7f" * 4, [Span(0, 4)]),
    ],
)
def test_what_cannot_be_patched(target: bytes, spans: list[Span]) -> None:
    with pytest.raises(InvalidInput):
        make_patch(b"\0" * 16, target, spans)
    with pytest.raises(InvalidInput):
        make_patch(b"\0" * 16, b"\1" * 16, [], levels=0)


@given(st.binary(min_size=1, max_size=400), st.data())
def test_differences_of_bytes_give_the_target_itself(base: bytes, data: st.DataObject) -> None:
    """Whatever lies in the spans and outside of them; forged and damaged patches are refused as the others are."""
    target = data.draw(st.binary(min_size=len(base), max_size=len(base)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(base)), max_size=6)))
    spans = [Span(begin, end - begin) for begin, end in zip(cuts[::2], cuts[1::2], strict=False)]
    patch = make_patch(base, target, spans, coding=Differences.BYTES)
    assert apply_patch(base, patch) == target
    assert (base_sha256(patch), coding_of(patch)) == (hashlib.sha256(base).digest(), Differences.BYTES)
    place = data.draw(st.integers(0, len(patch) - 5))
    forged = bytearray(patch[:-4])
    forged[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Corrupt):
        apply_patch(base, bytes(forged) + patch[-4:])
    try:
        made = apply_patch(base, bytes(forged) + struct.pack("<I", zlib.crc32(forged)))
    except Corrupt:
        return
    assert len(made) == len(base)
