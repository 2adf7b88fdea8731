"""What would leave the device, told to the person whose clips they are: in bytes and in plain words. Pure."""

from dataclasses import dataclass

from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.messages import Prototypes, UploadMode


@dataclass(frozen=True)
class Row:
    """One prototype: how many clips it stands for and its classes, likeliest first, as shares of 1."""

    clips: int
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Disclosure:
    """``message_bytes`` is the exact size of the message that would be sent; ``raw_bytes`` of the clips that stay."""

    rows: tuple[Row, ...]
    smallest: int
    message_bytes: int
    raw_bytes: int
    sentences: tuple[str, ...]


def disclose(prototypes: Prototypes, classes: tuple[str, ...], raw_bytes: int) -> Disclosure:
    """``classes`` name the columns of the prototypes. Nothing is sent."""
    message_bytes = prototypes_to_pb(prototypes).ByteSize()
    rows = tuple(
        Row(
            int(size),
            tuple(sorted(zip(classes, map(float, values_C), strict=True), key=lambda pair: -pair[1])),
        )
        for size, values_C in zip(prototypes.sizes_K, prototypes.values_KC, strict=True)
    )
    clips = sum(row.clips for row in rows)
    smallest = min(row.clips for row in rows)
    return Disclosure(
        rows=rows,
        smallest=smallest,
        message_bytes=message_bytes,
        raw_bytes=raw_bytes,
        sentences=(
            _what(prototypes, clips, smallest),
            _extent(message_bytes, clips, raw_bytes),
            _noise(prototypes),
        ),
    )


def _what(prototypes: Prototypes, clips: int, smallest: int) -> str:
    rows, classes = prototypes.values_KC.shape
    if prototypes.mode is UploadMode.PROBABILITIES:
        return (
            f"For each of your {clips} clips, {classes} numbers: how likely the student finds each class. "
            "The cloud sees every clip's own numbers. Mode 'prototypes' tells less."
        )
    if prototypes.features_KE is not None:
        return (
            f"{rows} averages of {classes} numbers (how likely the student finds each class), with each the average of "
            f"the {prototypes.features_KE.shape[1]} numbers that the student makes of a clip's sound and picture, and "
            f"how many of your {clips} clips it stands for: never fewer than {prototypes.min_cluster}, at the least "
            f"{smallest}. Those further numbers can tell of more than classes, such as a voice or a face. "
            "Mode 'prototypes' tells less."
        )
    return (
        f"{rows} averages of {classes} numbers (how likely the student finds each class), and how many of your "
        f"{clips} clips each average stands for: never fewer than {prototypes.min_cluster}, at the least {smallest}."
    )


def _extent(message_bytes: int, clips: int, raw_bytes: int) -> str:
    return (
        f"That is {message_bytes:,} bytes. Your {clips} clips are {raw_bytes:,} bytes; none of their sound or pictures "
        "leave this device: there is no message that could carry them."
    )


def _noise(prototypes: Prototypes) -> str:
    if prototypes.epsilon is None:
        return (
            "No noise is added. Averaging hides a single clip among its neighbours, but that is no formal guarantee: "
            "clips that are alike have an average that is like each of them."
        )
    return (
        f"Laplace noise is added to the averages; this spends a privacy budget of epsilon {prototypes.epsilon:g}, and "
        "as much again at every later round. Which clips are averaged together, and how many, is not hidden by it."
    )
