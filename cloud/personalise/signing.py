"""The server's Ed25519 key: created at the first start, kept in the state folder, pinned by each device.

A key is exchanged by a statement that both keys sign (``change_of``). Devices follow such statements from the key that
they pinned, so they need not enrol again.

Signatures cover bytes, so that a device verifies exactly the bytes that it then reads.
"""

import os
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from isthmus.data.files import sync
from isthmus.proto.convert_student import key_change_to_bytes
from isthmus.proto.errors import InvalidInput
from isthmus.proto.messages import KEY_CHANGE_CONTEXT, KeyChange, SignedKeyChange

_KEY_BYTES = 32
_MOST_VERIFIED = 1_024
"""Manifests whose signature is remembered as good or bad. One has a few kilobytes."""


class Signer:
    """Signs with one private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._public_key = key.public_key()
        self.public_key = self._public_key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        self._verified = lru_cache(_MOST_VERIFIED)(self._verify)

    def __repr__(self) -> str:
        return f"Signer(public_key={self.public_key.hex()})"

    def sign(self, content: bytes) -> bytes:
        """Return the Ed25519 signature (64 bytes) of ``content``."""
        return self._key.sign(content)

    def has_signed(self, signature: bytes, content: bytes) -> bool:
        """Return whether the signature of ``content`` is this key's. What was asked lately is remembered."""
        return self._verified(signature, content)

    def _verify(self, signature: bytes, content: bytes) -> bool:
        try:
            self._public_key.verify(signature, content)
        except InvalidSignature:
            return False
        return True


def load_or_create(path: Path) -> Signer:
    """Load the key in ``path``, or create it there (mode 0600) if there is none.

    Raises InvalidInput if the file is not such a key, or if others than its owner may read it.
    """
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder: remove it, or restore the signing key from a backup")
    try:
        return create(path)
    except FileExistsError:
        return load(path)


def create(path: Path) -> Signer:
    """Create a key in a new file (mode 0600), on the disk before this returns. Raises FileExistsError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    key = Ed25519PrivateKey.generate()
    with os.fdopen(fd, "wb") as file:
        file.write(key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)
    return Signer(key)


def change_of(previous: Signer, following: Signer, now_s: float) -> SignedKeyChange:
    """Return the statement that ``following`` signs in place of ``previous`` from ``now_s`` on."""
    change = key_change_to_bytes(KeyChange(previous.public_key, following.public_key, now_s))
    content = KEY_CHANGE_CONTEXT + change
    return SignedKeyChange(change, previous.sign(content), following.sign(content))


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
