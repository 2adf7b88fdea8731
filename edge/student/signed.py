"""A student in a folder: its signed manifest, and whether its files agree with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from isthmus.edge.student.disk import sha256_of
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.errors import Corrupt, WrongState
from isthmus.proto.messages import SignedManifest, StudentFile, StudentManifest

MANIFEST: Final = "manifest.pb"
SIGNATURE: Final = "manifest.sig"


@dataclass(frozen=True)
class Installed:
    """A verified student: its folder and its manifest."""

    folder: Path
    manifest: StudentManifest


def is_signed(key: bytes, signature: bytes, content: bytes) -> bool:
    """Return whether the Ed25519 signature (RFC 8032) of the content is the key's (32 bytes).

    libsodium also refuses keys of small order, for which one signature fits many contents.
    """
    try:
        VerifyKey(key).verify(content, signature)
    except (BadSignatureError, ValueError):
        return False
    return True


def read_manifest(folder: Path, student_id: str, keys: Sequence[bytes]) -> StudentManifest:
    """Return the manifest in the folder, if one of the keys signed it. The newest key is the last one.

    Raises WrongState if there is none, Corrupt if it cannot be read, is not signed, or belongs to another student.
    """
    try:
        signed = SignedManifest((folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes())
    except FileNotFoundError as error:
        raise WrongState(f"student {student_id} has not been fetched completely") from error
    except OSError as error:
        raise Corrupt(f"student {student_id}: its manifest cannot be read") from error
    if not any(is_signed(key, signed.signature, signed.manifest_bytes) for key in reversed(keys)):
        raise Corrupt(f"student {student_id}: its signature does not match the key pinned at enrolment")
    manifest = manifest_from_bytes(signed.manifest_bytes)
    if manifest.student_id != student_id:
        raise Corrupt(f"the manifest in {student_id} belongs to {manifest.student_id}")
    return manifest


def check_files(installed: Installed) -> None:
    """Raise Corrupt if a file of the student differs from its signed manifest."""
    for file in installed.manifest.files:
        check_file(installed.folder / file.name, file)


def check_file(path: Path, file: StudentFile) -> None:
    """Raise Corrupt if the file's size or hash is not that of the manifest."""
    if not (path.is_file() and path.stat().st_size == file.size_bytes and sha256_of(path) == file.sha256):
        raise Corrupt(f"{file.name}: the bytes on disk do not match the signed manifest")
