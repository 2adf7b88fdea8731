"""The hashes of the release's files, pinned in the database: a damaged or exchanged release is noticed and named."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from isthmus.cloud.store import pins
from isthmus.cloud.store.database import Database, Unusable

_PIN: Final = "release_files"
_DIGEST_BYTES: Final = 32
_BASE: Final = "base"
"""Folder of the release whose files all go to devices, so that one more file is a change too."""


def is_pinned(database: Database) -> bool:
    """Return whether a release has been served from this database."""
    return pins.get(database, _PIN) is not None


def pin(database: Database, root: Path, files: Iterable[Path]) -> None:
    """Pin the hashes of the release's files, in place of those that were pinned before."""
    hashes = json.dumps({str(path.relative_to(root)): _sha256(path) for path in files}).encode()
    pins.put(database, _PIN, hashlib.sha256(hashes).digest() + hashes)


def check(database: Database, root: Path) -> None:
    """Compare every file of the release with its pinned hash; without a pin there is nothing to compare.

    Raises Unusable, which names the file and the way out.
    """
    pinned = pins.get(database, _PIN)
    if pinned is None:
        return
    digest, hashes = pinned[:_DIGEST_BYTES], pinned[_DIGEST_BYTES:]
    if hashlib.sha256(hashes).digest() != digest:
        raise Unusable(f"the database {database.shown} is damaged: restore a backup ('isthmus cloud restore')")
    known: dict[str, str] = json.loads(hashes)
    changed = [name for name, sha256 in known.items() if _sha256(root / name) != sha256]
    present = {f"{_BASE}/{path.name}" for path in (root / _BASE).glob("*") if path.is_file()}
    changed += sorted(present - known.keys())
    if changed:
        were = f" and {len(changed) - 1} more files were" if len(changed) > 1 else " was"
        raise Unusable(
            f"the release is not the one that this server has served before: {root / changed[0]}{were} changed; "
            "restore it, or start once with --accept-release if you changed it on purpose"
        )


def _sha256(path: Path) -> str:
    """Return the hash of the file in hex; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
