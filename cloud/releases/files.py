"""The files of releases: hashed, compared with what was published, and put into the artefacts."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from isthmus.cloud.store import releases
from isthmus.cloud.store.artefacts import Artefacts, valid_name
from isthmus.cloud.store.database import Database, Unusable
from isthmus.cloud.store.releases import ReleaseFile, ReleaseRow
from isthmus.proto.errors import InvalidInput, NotYours

_BASE: Final = "base"
"""Folder of the release whose files all go to devices, so that one more file is a change too."""


def owner_of(release_id: str) -> str:
    """Return the owner of a release's files in the artefacts."""
    return f"release-{release_id}"


def described(root: Path, paths: Iterable[Path]) -> dict[str, ReleaseFile]:
    """Return hash and size of each file by its path below ``root``."""
    return {str(path.relative_to(root)): ReleaseFile(_sha256(path), path.stat().st_size) for path in paths}


def check(database: Database, root: Path) -> str | None:
    """Compare the files in ``root`` with those of the releases that are known.

    Returns the id of the release whose files they are; None if no release is known. Raises Unusable, which names a file
    that differs and the way out.
    """
    hashes: dict[str, str] = {}

    def sha256(name: str) -> str:
        if name not in hashes:
            hashes[name] = _sha256(root / name)
        return hashes[name]

    closest: list[str] | None = None
    for release in reversed(releases.listing(database)):
        changed = _changed(root, release, sha256)
        if not changed:
            return release.release_id
        if closest is None or len(changed) < len(closest):
            closest = changed
    if closest is None:
        return None
    were = f" and {len(closest) - 1} more files were" if len(closest) > 1 else " was"
    raise Unusable(
        f"the release is not one that this cloud has served before: {root / closest[0]}{were} changed; restore it, or "
        "publish another release with 'isthmus cloud release publish'. If you changed it on purpose and want every "
        "device to have it, start once with --accept-release"
    )


def store(
    artefacts: Artefacts,
    release_id: str,
    root: Path,
    files: Mapping[str, ReleaseFile],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Put the files of a release into the artefacts. Those that are there and sound already are left.

    ``on_bytes`` is called with the size of each file that is in its place. A publication that was killed is continued
    by the next one. Raises StorageFull, Unavailable, and InvalidInput for a name that cannot be stored or for a file
    that changed meanwhile.
    """
    owner = owner_of(release_id)
    for path, file in files.items():
        name, sha256 = Path(path).name, bytes.fromhex(file.sha256)
        if not valid_name(name):
            raise InvalidInput(f"{root / path} has a name that cannot be stored: letters, digits, '.', '_' and '-' can")
        if not _is_stored(artefacts, owner, name, sha256) and artefacts.put(owner, name, root / path) != sha256:
            raise InvalidInput(f"{root / path} changed while it was published; publish the release again")
        on_bytes(file.size_bytes)


def _is_stored(artefacts: Artefacts, owner: str, name: str, sha256: bytes) -> bool:
    try:
        return artefacts.sha256(owner, name, sha256) == sha256
    except NotYours:
        return False


def _changed(root: Path, release: ReleaseRow, sha256: Callable[[str], str]) -> list[str]:
    changed = [name for name, file in release.files.items() if sha256(name) != file.sha256]
    present = {f"{_BASE}/{path.name}" for path in (root / _BASE).glob("*") if path.is_file()}
    return changed + sorted(present - release.files.keys())


def _sha256(path: Path) -> str:
    """Return the hash of the file in hexadecimal; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
