"""Identity of callers: a device enrols once and sends its token with every later call. Plain functions without grpc.

A token is ``<device id>.<secret>``. The database stores the SHA-256 of the whole token. The secret has 256
random bits, so a plain hash is enough.
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
from isthmus.proto.limits import MAX_NAME_CHARS, MAX_ROUNDS
from isthmus.proto.messages import Enrolment

_UNKNOWN_HASH = hashlib.sha256(b"no such device").digest()


@dataclass(frozen=True)
class Gate:
    """Who may enrol.

    If ``enrolment_key`` is None, anyone who can reach the server may enrol; the server then listens on loopback only.
    """

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
    """Enrol a device. ``new_secret`` returns a fresh (device id, secret).

    Raises Unauthenticated if the key is wrong, TooLarge or InvalidInput if the name cannot be shown, and Busy if the
    server already has as many devices as it accepts.
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
        raise Busy("this server accepts no more devices; ask the operator")
    return Enrolment(
        device_id=device_id,
        token=token,
        signing_public_key=signing_public_key,
        classes=offer.classes,
        input_spec_json=offer.input_spec_json,
        feature_width=offer.feature_width,
        rounds=min(offer.rounds, MAX_ROUNDS),
    )


def authenticate(database: Database, token: str) -> Device:
    """Return the device that a token belongs to. Raises Unauthenticated, with one message for every reason."""
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
    """Return whether two secrets are equal. The time taken reveals nothing about either."""
    # Hashed first, so that the time does not reveal the key's length.
    return hmac.compare_digest(_hash(given), _hash(wanted))
