"""Checks of single values that peers send: ids, names, texts, numbers."""

import math
import re
from collections.abc import Iterable
from typing import Final

from isthmus.proto.errors import InvalidInput, TooLarge
from isthmus.proto.limits import MAX_CLASS_NAME_CHARS, MAX_CLASSES, MAX_FEATURE_WIDTH, MAX_NAME_CHARS

MAX_TEXT_CHARS: Final = 4_096
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FILE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.]*\.onnx")


def identifier(field: str, text: str, *, optional: bool = False) -> str:
    """Return ``text`` if it is an id: at most 64 letters, digits, ``_ . -``, starting with a letter or digit.

    Ids become folder names and metadata, so anything else raises InvalidInput.
    """
    if (optional and not text) or (len(text) <= MAX_NAME_CHARS and _IDENTIFIER.fullmatch(text)):
        return text
    raise InvalidInput(f"{field}: not an id (letters, digits, '_', '.', '-', at most {MAX_NAME_CHARS})")


def file_name(text: str) -> str:
    """Return ``text`` if it is the name of a student's file: lower case, no folder, ``.onnx``. Raises InvalidInput."""
    if len(text) <= MAX_NAME_CHARS and _FILE_NAME.fullmatch(text):
        return text
    raise InvalidInput("file name: not the name of a student's file")


def classes_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of classes. Raises TooLarge for too much text, InvalidInput for equal or empty names."""
    classes = tuple(names)
    if len(classes) > MAX_CLASSES or any(len(name) > MAX_CLASS_NAME_CHARS for name in classes):
        raise TooLarge("classes: too many, or a name too long")
    if len(classes) < 2 or len(set(classes)) != len(classes) or not all(classes):
        raise InvalidInput("classes: at least two different names are wanted")
    return classes


def feature_width_of(width: int) -> int:
    """Return the width if it is possible. Raises TooLarge or InvalidInput."""
    if width > MAX_FEATURE_WIDTH:
        raise TooLarge(f"feature width {width}; at most {MAX_FEATURE_WIDTH} is accepted")
    if width < 1:
        raise InvalidInput(f"feature width {width}")
    return width


def bounded_text(field: str, text: str) -> str:
    """Return the text. Raises TooLarge if it is longer than ``MAX_TEXT_CHARS``."""
    if len(text) > MAX_TEXT_CHARS:
        raise TooLarge(f"{field}: longer than {MAX_TEXT_CHARS} characters")
    return text


def check_finite(subject: str, numbers: Iterable[float]) -> None:
    """Raise InvalidInput if a number is infinite or undefined."""
    if not all(math.isfinite(number) for number in numbers):
        raise InvalidInput(f"{subject}: a number is not finite")
