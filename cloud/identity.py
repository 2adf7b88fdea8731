"""Who calls: devices enrol once, and show their token with every other call. Plain functions that know no grpc.

A token is ``<device id>.<secret>``. The database holds the SHA-256 of the whole; the secret is 256 random bits, so a
plain hash is enough.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.cloud.offer import Offer
from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.devices import Device
from isthmus.proto.errors import Busy, InvalidInput, TooLarge, Unauthenticated
from isthmus.proto.limits import MAX_NAME_CHARS
from isthmus.proto.messages import Enrolment

_UNKNOWN_HASH = hashlib.sha256(b"no such device").digest()


@dataclass(frozen=True)
class Gate:
    """Who may enrol. ``enrolment_key`` None: anyone who can reach the server, which then listens on loopback only."""

    enrolment_key: str | None
    max_devices: int

    def __repr__(self) -> str:
        return f"Gate(enrolment_key={'<secret>' if self.enrolment_key else None}, max_devices={self.max_devices})"


def enrol(
    database: Database,
    gate: Gate,
    offer: Offer,
    signing_public_key: bytes,
    *,
    device_name: str,
    enrolment_key: str,
    now_s: float,
    new_secret: Callable[[], tuple[str, str]],
) -> Enrolment:
    """Makes a device known. ``new_secret`` gives a fresh (device id, secret).

    Raises Unauthenticated for a wrong key, TooLarge or InvalidInput for a name that cannot be shown, Busy when the
    server has all the devices that it takes.
    """
    if gate.enrolment_key is not None and not same_secret(enrolment_key, gate.enrolment_key):
        raise Unauthenticated("the enrolment key is missing or wrong; ask the operator for it")
    if len(device_name) > MAX_NAME_CHARS:
        raise TooLarge(f"device name: longer than {MAX_NAME_CHARS} characters")
    if not device_name.isprintable():
        raise InvalidInput("device name: printable characters only")
    device_id, secret = new_secret()
    token = f"{device_id}.{secret}"
    device = Device(device_id, device_name, _hash(token), now_s)
    if not devices.add(database, device, at_most=gate.max_devices):
        raise Busy("this server takes no more devices; ask the operator")
    return Enrolment(
        device_id=device_id,
        token=token,
        signing_public_key=signing_public_key,
        classes=offer.classes,
        input_spec_json=offer.input_spec_json,
        feature_width=offer.feature_width,
    )


def authenticate(database: Database, token: str) -> Device:
    """The device that a token belongs to. Raises Unauthenticated, with one message for every reason."""
    device_id = token.partition(".")[0]
    known = devices.get(database, device_id) if 0 < len(device_id) <= 32 else None
    # An unknown device costs the same comparison as a known one.
    fits = hmac.compare_digest(_hash(token), known.token_hash if known else _UNKNOWN_HASH)
    if known is None or not fits or known.revoked_s is not None:
        raise Unauthenticated("unknown token; enrol this device again")
    return known


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def same_secret(given: str, wanted: str) -> bool:
    """Whether two secrets are the same, in a time that tells nothing of either."""
    # Hashed first, so that the time does not tell the key's length.
    return hmac.compare_digest(_hash(given), _hash(wanted))
