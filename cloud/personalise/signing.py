"""The server's Ed25519 key: created at the first start, kept in the state folder, pinned by each device.

Signatures cover bytes, so that a device verifies exactly the bytes that it then reads.
"""

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from isthmus.proto.errors import InvalidInput

_KEY_BYTES = 32


class Signer:
    """Signs with one private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def __repr__(self) -> str:
        return f"Signer(public_key={self.public_key.hex()})"

    def sign(self, content: bytes) -> bytes:
        """Return the Ed25519 signature (64 bytes) of ``content``."""
        return self._key.sign(content)


def load_or_create(path: Path) -> Signer:
    """Load the key in ``path``, or create it there (mode 0600) if there is none.

    Raises InvalidInput if the file is not such a key, or if others than its owner may read it.
    """
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder: remove it, or restore the signing key from a backup")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return load(path)
    key = Ed25519PrivateKey.generate()
    with os.fdopen(fd, "wb") as file:
        file.write(key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    return Signer(key)


def load(path: Path) -> Signer:
    """Load the key in ``path``. Raises InvalidInput if there is none, or as ``load_or_create`` does."""
    if not path.is_file():
        raise InvalidInput(f"there is no signing key in {path}")
    if path.stat().st_mode & 0o077:
        raise InvalidInput(f"other users may read the signing key; run: chmod 600 {path}")
    content = path.read_bytes()
    if len(content) != _KEY_BYTES:
        raise InvalidInput(f"{path} is damaged: restore the signing key from a backup ('isthmus cloud restore')")
    return Signer(Ed25519PrivateKey.from_private_bytes(content))
