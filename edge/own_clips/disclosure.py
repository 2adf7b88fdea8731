"""An upload explained to the person whose clips it comes from, in bytes and in plain words. Pure."""

from dataclasses import dataclass

from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.messages import Prototypes, UploadMode


@dataclass(frozen=True)
class Row:
    """One prototype: the number of its clips, and its classes with their shares of 1, likeliest first."""

    clips: int
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Disclosure:
    """An explained upload. ``message_bytes``: exact size of the message; ``raw_bytes``: size of the clips."""

    rows: tuple[Row, ...]
    smallest: int
    message_bytes: int
    raw_bytes: int
    sentences: tuple[str, ...]


def disclose(prototypes: Prototypes, classes: tuple[str, ...], raw_bytes: int) -> Disclosure:
    """Explain the prototypes, whose columns are ``classes``. Nothing is sent."""
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
    averages = "1 average" if rows == 1 else f"{rows} averages"
    if prototypes.mode is UploadMode.PROBABILITIES:
        return (
            f"For each of your {clips} clips, {classes} numbers: how likely the student finds each class. "
            "The cloud sees the numbers of every single clip. Mode 'prototypes' reveals less."
        )
    if prototypes.features_KE is not None:
        return (
            f"{averages} of {classes} numbers (how likely the student finds each class). With each goes the "
            f"average of the {prototypes.features_KE.shape[1]} numbers that the student makes of a clip's sound and "
            f"picture, and how many of your {clips} clips were averaged: never fewer than {prototypes.min_cluster}, "
            f"here at least {smallest}. The further numbers can reveal more than classes, such as a voice or a face. "
            "Mode 'prototypes' reveals less."
        )
    return (
        f"{averages} of {classes} numbers (how likely the student finds each class), and how many of your "
        f"{clips} clips were averaged for each: never fewer than {prototypes.min_cluster}, here at least {smallest}."
    )


def _extent(message_bytes: int, clips: int, raw_bytes: int) -> str:
    return (
        f"That is {message_bytes:,} bytes. Your {clips} clips are {raw_bytes:,} bytes. Their sound and pictures stay "
        "on this device: no message could carry them."
    )


def _noise(prototypes: Prototypes) -> str:
    if prototypes.epsilon is None:
        return (
            "No noise is added. Averaging hides a single clip among its neighbours, but that is no formal guarantee: "
            "the average of similar clips is similar to each of them."
        )
    return (
        f"Laplace noise is added to the averages. This spends a privacy budget of epsilon {prototypes.epsilon:g}, and "
        "the same again in every later round. The noise does not hide which clips are averaged together, or how many."
    )
