"""Whether state folder, database and signing key still belong together. Nothing is ever started over silently.

The database holds an id of its own, the state folder holds the same id in ``database.id``, and the database pins the
public half of the signing key. So an emptied or exchanged database is noticed, and so is a lost or exchanged key.

The key is exchanged on purpose by ``rotate_key``. The database then holds the statement of the change, which devices
follow, and pins the new key.
"""

import secrets
from pathlib import Path
from typing import Final

from isthmus.cloud.personalise import signing
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.store import pins, students
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database, Unusable
from isthmus.data.files import move, write_atomically
from isthmus.proto.convert_student import key_change_from_bytes, signed_key_change_from_pb, signed_key_change_to_pb
from isthmus.proto.errors import NotYours
from isthmus.proto.limits import MAX_KEY_CHANGES
from isthmus.proto.messages import SignedKeyChange
from isthmus.proto.v1 import isthmus_pb2 as pb

_STORE: Final = "store"
"""Owner of the mark in the artefacts."""
ID_FILE: Final = "database.id"
_ID_BYTES: Final = 16
_ID_PIN: Final = "id"
_KEY_PIN: Final = "signing_public_key"
_CHANGE_PIN: Final = "key_change_"
_WAY_OUT: Final = (
    "restore a backup ('isthmus cloud restore'), or start over with another --state and --database: "
    "every device must then enrol again"
)


def same_database(database: Database, state: Path, signing_key: Path, artefacts: Artefacts, *, was_empty: bool) -> None:
    """Check that ``database`` is the one that ``state`` was used with before. A new pair is joined.

    A new ``state`` may join a PostgreSQL database that other servers use. It then needs their signing key, and the
    store of artefacts that they use. ``was_empty``: the database had no tables before this start. Raises Unusable.
    """
    path = state / ID_FILE
    known = _read_id(path)
    if was_empty and (known is not None or signing_key.exists()):
        raise Unusable(f"the database {database.shown} is empty; that of {state} was not: {_WAY_OUT}")
    own = pins.put_once(database, _ID_PIN, secrets.token_bytes(_ID_BYTES))
    if known is None:
        if database.shared and not was_empty and pins.get(database, _KEY_PIN) is not None:
            check_joining(database, signing_key, artefacts)
        write_atomically(path, f"{own.hex()}\n")
    elif known != own:
        raise Unusable(
            f"the database {database.shown} is not the one that {path} names. If nothing but that file was damaged, "
            f"remove it; else {_WAY_OUT}"
        )


def mark(database: Database, state: Path, artefacts: Artefacts) -> None:
    """Let other servers see that these are the artefacts of this database, unless it is SQLite."""
    if database.shared and _marked(artefacts) != pins.get(database, _ID_PIN):
        artefacts.place(_STORE, ID_FILE, state / ID_FILE)


def check_joining(database: Database, signing_key: Path, artefacts: Artefacts) -> None:
    """Check what a new server or worker needs to join the others of a PostgreSQL database. Raises Unusable."""
    if not signing_key.exists():
        raise Unusable(
            f"other servers use the database {database.shown}, and devices trust their signing key: copy it to "
            f"{signing_key}, or give --signing-key-file"
        )
    own = pins.get(database, _ID_PIN)
    if own is None:
        raise Unusable(f"no server has used the database {database.shown} yet: start 'isthmus cloud serve' on it first")
    marked = _marked(artefacts)
    if marked != own and not (marked is None and _hold_its_students(artefacts, database)):
        raise Unusable(
            f"other servers use the database {database.shown}, and their students are not in this server's artefacts: "
            "give all of them the same --artefacts, a bucket or a shared folder"
        )


def _hold_its_students(artefacts: Artefacts, database: Database) -> bool:
    """Return whether base students of the database are in the artefacts. Version 0.1 left no mark there."""
    return any(artefacts.names(row.student_id) for row in students.bases(database))


def _marked(artefacts: Artefacts) -> bytes | None:
    try:
        with artefacts.open(_STORE, ID_FILE) as file:
            return bytes.fromhex(file.read(4 * _ID_BYTES).decode())
    except (NotYours, ValueError):
        return None


def check_key(database: Database, signer: Signer, path: Path) -> None:
    """Check that the key in ``path`` is the one that the database's devices trust. Raises Unusable."""
    if pins.get(database, _KEY_PIN) not in (None, signer.public_key):
        if any(
            key_change_from_bytes(each.change_bytes).previous_key == signer.public_key for each in key_changes(database)
        ):
            raise Unusable(f"{path} is a key that was retired: copy the new one here from where it was made")
        raise Unusable(f"{path} was damaged or exchanged: no device trusts this key. {_WAY_OUT.capitalize()}")


def same_key(database: Database, signing_key: Path) -> Signer:
    """Return the signing key, made at the first start. Raises Unusable if it is lost or another one.

    Raises InvalidInput if the file is no key, or if others may read it.
    """
    pinned = pins.get(database, _KEY_PIN)
    _finish_rotation(pinned, signing_key)
    if pinned is not None and not signing_key.exists():
        raise Unusable(f"the signing key {signing_key} is gone; every device trusts it. {_WAY_OUT.capitalize()}")
    signer = signing.load_or_create(signing_key)
    pins.put_once(database, _KEY_PIN, signer.public_key)
    check_key(database, signer, signing_key)
    return signer


def rotate_key(database: Database, signing_key: Path, now_s: float) -> Signer:
    """Make a new signing key, which the present one signs, and put it in its place. No server may be running.

    A kill at any moment leaves the old key in use, or lets the next start finish. Raises Unusable if the present key is
    not the one that devices trust or was changed ``MAX_KEY_CHANGES`` times, InvalidInput if it cannot be read.
    """
    pinned = pins.get(database, _KEY_PIN)
    _finish_rotation(pinned, signing_key)
    present = signing.load(signing_key)
    if pinned is None:
        raise Unusable(
            f"the database {database.shown} knows no signing key yet: start 'isthmus cloud serve' on it first"
        )
    check_key(database, present, signing_key)
    known = len(pins.beginning_with(database, _CHANGE_PIN))
    if known >= MAX_KEY_CHANGES:
        raise Unusable(
            f"the key was changed {known} times, and devices follow no more changes. {_WAY_OUT.capitalize()}"
        )
    following = _next_to(signing_key)
    following.unlink(missing_ok=True)
    signer = signing.create(following)
    change = signed_key_change_to_pb(signing.change_of(present, signer, now_s)).SerializeToString(deterministic=True)
    pins.put_all(database, {f"{_CHANGE_PIN}{known:04}": change, _KEY_PIN: signer.public_key})
    move(following, signing_key)
    return signer


def key_changes(database: Database) -> tuple[SignedKeyChange, ...]:
    """Return every change of the signing key, oldest first."""
    found = pins.beginning_with(database, _CHANGE_PIN)
    return tuple(signed_key_change_from_pb(pb.SignedKeyChange.FromString(each)) for each in found)


def _finish_rotation(pinned: bytes | None, signing_key: Path) -> None:
    """Put the new key in its place if a kill came between the database and the file."""
    following = _next_to(signing_key)
    if pinned is not None and following.is_file() and signing.load(following).public_key == pinned:
        move(following, signing_key)


def _next_to(signing_key: Path) -> Path:
    return signing_key.with_name(f"{signing_key.name}.next")


def _read_id(path: Path) -> bytes | None:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path} cannot be read: remove it, it is written again at the next start") from error
    try:
        known = bytes.fromhex(text)
    except ValueError:
        known = b""
    if len(known) != _ID_BYTES:
        raise Unusable(f"{path} is damaged: remove it, it is written again at the next start")
    return known
