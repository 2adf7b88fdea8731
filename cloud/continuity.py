"""Whether state folder, database and signing key still belong together. Nothing is ever started over silently.

The database holds an id of its own, the state folder holds the same id in ``database.id``, and the database pins the
public half of the signing key. So an emptied or exchanged database is noticed, and so is a lost or exchanged key.
"""

import secrets
from pathlib import Path
from typing import Final

from isthmus.cloud.personalise import signing
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.store import pins
from isthmus.cloud.store.database import Database, Unusable
from isthmus.data.files import write_atomically

ID_FILE: Final = "database.id"
_ID_BYTES: Final = 16
_ID_PIN: Final = "id"
_KEY_PIN: Final = "signing_public_key"
_WAY_OUT: Final = (
    "restore a backup ('isthmus cloud restore'), or start over with another --state and --database: "
    "every device must then enrol again"
)


def same_database(database: Database, state: Path, signing_key: Path, *, was_empty: bool) -> None:
    """Check that ``database`` is the one that ``state`` was used with before. A new pair is joined.

    ``was_empty``: the database had no tables before this start. Raises Unusable.
    """
    path = state / ID_FILE
    known = _read_id(path)
    if was_empty and (known is not None or signing_key.exists()):
        raise Unusable(f"the database {database.shown} is empty; that of {state} was not: {_WAY_OUT}")
    own = pins.get(database, _ID_PIN)
    if own is None:
        own = secrets.token_bytes(_ID_BYTES)
        pins.put(database, _ID_PIN, own)
    if known is None:
        write_atomically(path, f"{own.hex()}\n")
    elif known != own:
        raise Unusable(f"the database {database.shown} is not the one that {state} was used with: {_WAY_OUT}")


def same_key(database: Database, signing_key: Path) -> Signer:
    """Return the signing key, made at the first start. Raises Unusable if it is lost or another one.

    Raises InvalidInput if the file is no key, or if others may read it.
    """
    pinned = pins.get(database, _KEY_PIN)
    if pinned is not None and not signing_key.exists():
        raise Unusable(f"the signing key {signing_key} is gone; every device trusts it. {_WAY_OUT.capitalize()}")
    signer = signing.load_or_create(signing_key)
    if pinned is None:
        pins.put(database, _KEY_PIN, signer.public_key)
    elif pinned != signer.public_key:
        raise Unusable(f"{signing_key} was damaged or exchanged: no device trusts this key. {_WAY_OUT.capitalize()}")
    return signer


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
