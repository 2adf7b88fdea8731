"""Identity of callers: a device enrols once and sends its token with every later call. Plain functions without grpc.

A token is ``<device id>.<secret>``. The database stores the SHA-256 of the whole token. The secret has 256
random bits, so a plain hash is enough.
"""

import hashlib
import hmac
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.tenants import DEFAULT, OverQuota
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.errors import InvalidInput, IsthmusError, TooLarge, Unauthenticated
from isthmus.proto.limits import MAX_NAME_CHARS, MAX_ROUNDS
from isthmus.proto.messages import Enrolment

_SEEN_EVERY_S: Final = 3_600.0
_UNKNOWN_HASH: Final = hashlib.sha256(b"no such device").digest()


class WrongKey(Unauthenticated):
    """An enrolment key that does not fit. On the wire it is Unauthenticated."""


@dataclass(frozen=True)
class Gate:
    """Who may enrol.

    If ``enrolment_key`` is None, anyone who can reach the server may enrol; the server then listens on loopback only.
    """

    enrolment_key: str | None
    max_devices: int
    max_per_hour: int | None = None

    def __repr__(self) -> str:
        key = "<secret>" if self.enrolment_key else None
        return f"Gate(enrolment_key={key}, max_devices={self.max_devices}, max_per_hour={self.max_per_hour})"


def enrol(
    database: Database,
    gate: Gate,
    offered: Callable[[str], Offer],
    signing_public_key: bytes,
    *,
    device_name: str,
    enrolment_key: str,
    now_s: float,
    new_secret: Callable[[], tuple[str, str]],
    roster: Roster,
    certificate: str | None = None,
) -> Enrolment:
    """Enrol a device with the tenant whose key it sends. ``new_secret`` returns a fresh (device id, secret).

    ``offered`` returns what the device of an id is offered.

    ``certificate``: identity in the caller's TLS certificate, which the device's later calls must show too.

    Raises WrongKey if the key is wrong, TooLarge or InvalidInput if the name cannot be shown, and Busy if the
    server or the tenant has as many devices as it may, or too many enrolled within the last hour.
    """
    tenant = roster.of_key(enrolment_key, "enrol")
    if tenant is None:
        if gate.enrolment_key is None:  # anyone may enrol, but who sends a key means a tenant, if there is any
            wrong = bool(enrolment_key) and (roster.has_keys("enrol") or roster.names() != [DEFAULT])
        else:
            wrong = not same_secret(enrolment_key, gate.enrolment_key)
        if wrong:
            raise WrongKey("the enrolment key is missing or wrong; ask the operator for it")
        tenant = DEFAULT
    roster.admit(tenant)
    if len(device_name) > MAX_NAME_CHARS:
        raise TooLarge(f"device name: longer than {MAX_NAME_CHARS} characters")
    if not device_name.isprintable():
        raise InvalidInput("device name: printable characters only")
    device_id, secret = new_secret()
    token, offer = f"{device_id}.{secret}", offered(device_id)
    device = Device(device_id, device_name, _hash(token), now_s, tenant=tenant, certificate=certificate)
    most = roster.quotas(tenant).most_devices
    try:
        devices.add(
            database,
            device,
            at_most=gate.max_devices,
            at_most_per_hour=gate.max_per_hour,
            at_most_of_tenant=most,
        )
    except OverQuota:
        roster.refuse(tenant, "devices")
        raise
    return Enrolment(
        device_id=device_id,
        token=token,
        signing_public_key=signing_public_key,
        classes=offer.classes,
        input_spec_json=offer.input_spec_json,
        feature_width=offer.feature_width,
        rounds=min(offer.rounds, MAX_ROUNDS),
    )


def authenticate(database: Database, token: str, now_s: float, certificate: str | None = None) -> Device:
    """Return the device that a token belongs to, and record that it was seen.

    ``certificate``: identity in the caller's TLS certificate. A device that enrolled with a certificate needs one of
    that identity with each call, and then needs no token.

    Raises Unauthenticated, with one message for every reason.
    """
    if not token and certificate is not None:
        shown = devices.of_certificate(database, certificate)
        if shown is None:
            raise Unauthenticated("no device, or several, enrolled with this certificate; send the device's token")
        return shown
    device_id = token.partition(".")[0]
    known = devices.get(database, device_id) if 0 < len(device_id) <= 32 else None
    # An unknown device costs the same comparison as a known one.
    fits = hmac.compare_digest(_hash(token), known.token_hash if known else _UNKNOWN_HASH)
    other = known is not None and known.certificate is not None and known.certificate != certificate
    if known is None or not fits or other or known.revoked_s is not None:
        raise Unauthenticated("unknown token; enrol this device again")
    if known.seen_s is None or now_s - known.seen_s > _SEEN_EVERY_S:
        # A full disk or a busy database is no reason to refuse a call that only reads.
        with suppress(IsthmusError):
            devices.saw(database, device_id, now_s)
    return known


@dataclass(frozen=True)
class Asking:
    """Who asks models, which have no devices: a tenant. ``known``: it has proved so with a key."""

    tenant: str
    known: bool


def asking(roster: Roster, key: str | None, token: str) -> Asking:
    """Return whose call of a model it is, by the key that was sent; "" if none was.

    ``key``: that of the tenant "default". If there is no key at all, everyone is served as "default". Raises
    Unauthenticated for a key that fits nothing.
    """
    owner = roster.of_key(token, "query") if token else None
    if owner is None and key is None and not (token and roster.has_keys("query")):
        return Asking(DEFAULT, known=False)
    if owner is None and (key is None or not same_secret(token, key)):
        raise Unauthenticated(
            "the key is wrong; ask the operator for it"
            if token
            else "no token: ask the operator for the key, then send 'authorization: Bearer <token>'"
        )
    return Asking(owner or DEFAULT, known=True)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def same_secret(given: str, wanted: str) -> bool:
    """Return whether two secrets are equal. The time taken reveals nothing about either."""
    # Hashed first, so that the time does not reveal the key's length.
    return hmac.compare_digest(_hash(given), _hash(wanted))
