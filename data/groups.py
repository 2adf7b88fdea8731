"""Which clips show the same recording or the same picture, so that a split never has it on both sides.

A data set may say so in ``manifest.csv``: a column ``clip``, and one or more of ``GROUPS`` with the name of what a clip
was made of. Without a manifest every clip is a recording of its own.
"""

import csv
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from isthmus.data.files import open_text

MANIFEST: Final = "manifest.csv"
GROUPS: Final = ("emodb_utterance", "face_image", "source")
"""Columns that name a recording or a picture."""


@dataclass(frozen=True)
class Groups:
    """``of``: clip -> the recordings and pictures in it."""

    of: Mapping[str, frozenset[str]]

    def made_of(self, name: str) -> frozenset[str]:
        """Return the recordings and pictures in a clip; a clip that is not listed is a recording of its own."""
        return self.of.get(name, frozenset({name}))

    def distinct(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return as many of the clips, in order, as share nothing with each other: each is taken if it can be."""
        taken: set[str] = set()
        found = []
        for name in names:
            here = self.made_of(name)
            if not here & taken:
                taken |= here
                found.append(name)
        return tuple(found)

    def share(self, name: str, others: Collection[str]) -> bool:
        """Return whether a clip shares a recording or a picture with one of the others."""
        here = self.made_of(name)
        return any(here & self.made_of(other) for other in others)


def read_groups(root: Path, names: Iterable[str]) -> Groups:
    """Read the manifest of a data set. Raises ValueError if it names a column of groups, but lacks a clip."""
    path = root / MANIFEST
    if not path.is_file():
        return Groups({name: frozenset({name}) for name in names})
    found: dict[str, frozenset[str]] = {}
    with open_text(path, newline="") as file:
        rows = csv.DictReader(file)
        columns = [column for column in GROUPS if column in (rows.fieldnames or ())]
        for row in rows:
            found[row.get("clip", "")] = frozenset(f"{column} {row[column]}" for column in columns if row[column])
    if not columns:
        return Groups({name: frozenset({name}) for name in names})
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise ValueError(f"{path} does not say what {missing[0]} was made of (columns {', '.join(columns)})")
    return Groups(found)
