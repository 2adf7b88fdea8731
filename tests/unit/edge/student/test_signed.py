"""What counts as signed: the signatures of RFC 8032 and of the cloud's own library, and nothing else."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from isthmus.edge.student.signed import is_signed

RFC_8032 = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
            "387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
            "4a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
]
"""Public key, content and signature of section 7.1, tests 1 to 3."""


@pytest.mark.parametrize(("key", "content", "signature"), RFC_8032)
def test_the_signatures_of_the_standard_are_accepted(key: str, content: str, signature: str) -> None:
    assert is_signed(bytes.fromhex(key), bytes.fromhex(signature), bytes.fromhex(content))


@given(seed=st.binary(min_size=32, max_size=32), content=st.binary(max_size=300), data=st.data())
def test_what_the_cloud_signs_is_accepted_and_one_other_bit_is_not(
    seed: bytes, content: bytes, data: st.DataObject
) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    parts = [private.public_key().public_bytes_raw(), private.sign(content), content]
    assert is_signed(*parts)
    which = data.draw(st.integers(0, 2 if content else 1), label="part")
    bit = data.draw(st.integers(0, 8 * len(parts[which]) - 1), label="bit")
    damaged = bytearray(parts[which])
    damaged[bit // 8] ^= 1 << bit % 8
    parts[which] = bytes(damaged)
    assert not is_signed(*parts)


@given(key=st.binary(max_size=80), signature=st.binary(max_size=130), content=st.binary(max_size=80))
def test_bytes_of_any_length_are_refused_without_an_error(key: bytes, signature: bytes, content: bytes) -> None:
    assert not is_signed(key, signature, content)


def test_a_key_of_small_order_is_refused() -> None:
    """Its one signature would fit every content: the neutral element as key and as the signature's point, and zero."""
    neutral = b"\1".ljust(32, b"\0")
    assert not is_signed(neutral, neutral + bytes(32), b"any content")
