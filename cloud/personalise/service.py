"""The requests of devices about personalisations: start, upload, look. Plain functions without grpc."""

from collections.abc import Callable

import sqlalchemy as sa

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import Job, Uploaded
from isthmus.cloud.releases.catalogue import Catalogue
from isthmus.cloud.store import tenants
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.tenants import DEFAULT, OverQuota
from isthmus.proto.convert import prototypes_from_pb, prototypes_to_pb
from isthmus.proto.errors import BadPrototypes, InvalidInput, NotYours
from isthmus.proto.limits import MAX_NAME_CHARS, MAX_ROUNDS
from isthmus.proto.messages import Prototypes, UploadMode
from isthmus.proto.v1 import isthmus_pb2 as pb

_SEED_LIMIT = 2**31
"""Exclusive upper bound of seeds. numpy accepts no negative seeds, and the job derives others by small additions."""


def start(
    catalogue: Catalogue,
    device_id: str,
    *,
    idempotency_key: str,
    prototypes: Prototypes,
    rounds: int,
    seed: int,
    now_s: float,
    new_id: Callable[[], str],
    at_most_waiting: int,
    tenant: str = DEFAULT,
    at_most_a_day: int | None = None,
    trace: str = "",
) -> Job:
    """Start a personalisation on the release that the device is offered, or return the one of the same key.

    ``at_most_a_day``: how many its tenant may start per day. ``trace``: context of the call, see proto/trace.py.

    Raises InvalidInput, BadPrototypes, Busy, and WrongState if this device has another one that has not ended.
    """
    if not 0 < len(idempotency_key) <= MAX_NAME_CHARS or not idempotency_key.isprintable():
        raise InvalidInput(f"idempotency key: 1 to {MAX_NAME_CHARS} printable characters")
    database, offer = catalogue.database, catalogue.offered(device_id).offer
    most_rounds = min(MAX_ROUNDS, offer.epochs)
    if not 0 <= rounds <= most_rounds:
        raise InvalidInput(f"rounds: 0 (the server's choice) to {most_rounds}")
    if not 0 <= seed < _SEED_LIMIT:
        raise InvalidInput(f"seed: 0 to {_SEED_LIMIT - 1}")
    check_prototypes(offer, prototypes)
    job = Job(
        job_id=new_id(),
        device_id=device_id,
        idempotency_key=idempotency_key,
        release_hash=offer.release_hash,
        seed=seed,
        rounds=rounds or offer.rounds,
        created_s=now_s,
        updated_s=now_s,
    )

    def admit(connection: sa.Connection) -> None:
        used = tenants.count(connection, tenant, tenants.day_of(now_s), jobs=1)
        if at_most_a_day is not None and used.jobs > at_most_a_day:
            raise OverQuota(
                "your quota of personalisations per day is used up; try again tomorrow, or ask the operator for a "
                "higher one",
                retry_after_s=tenants.DAY_S - now_s % tenants.DAY_S,
            )

    payload = to_payload(prototypes)
    return job_rows.create(database, job, payload, at_most_waiting=at_most_waiting, admit=admit, trace=trace)[0]


def upload(
    catalogue: Catalogue, device_id: str, *, job_id: str, round: int, prototypes: Prototypes, now_s: float
) -> Job:
    """Accept the prototypes of a later round. Repeating the last accepted upload changes nothing.

    Raises NotYours, BadPrototypes, OutOfOrder if another round is awaited, and WrongState if none is or the job's
    release is gone.
    """
    database = catalogue.database
    job = get(database, device_id, job_id)
    check_prototypes(catalogue.of(job.release_hash), prototypes)
    payload = to_payload(prototypes)
    if round == job.round and not job.stage.ended and _has_upload(database, job, payload):
        return job
    return job_rows.apply(database, job_id, Uploaded(round), now_s, upload=payload)[0]


def get(database: Database, device_id: str, job_id: str) -> Job:
    """Return the device's own job. Raises NotYours."""
    job = job_rows.get(database, job_id)
    if job is None or job.device_id != device_id:
        raise NotYours("no such job")
    return job


def check_prototypes(offer: Offer, prototypes: Prototypes) -> None:
    """Check prototypes against the release: number of classes, feature width and the floor of cluster sizes.

    Raises BadPrototypes.
    """
    classes = prototypes.values_KC.shape[1]
    if classes != len(offer.classes):
        raise BadPrototypes(f"prototypes: {classes} classes; this server has {len(offer.classes)}")
    if prototypes.mode is not UploadMode.PROBABILITIES and int(prototypes.sizes_K.min()) < offer.min_cluster:
        raise BadPrototypes(f"prototypes: one averages fewer than {offer.min_cluster} clips, the server's floor")
    if prototypes.features_KE is not None and prototypes.features_KE.shape[1] != 2 * offer.feature_width:
        values = prototypes.features_KE.shape[1]
        raise BadPrototypes(
            f"prototypes: {values} feature values per row; this server's students have 2 x {offer.feature_width}"
        )


def to_payload(prototypes: Prototypes) -> bytes:
    """Return the bytes stored for an upload."""
    return prototypes_to_pb(prototypes).SerializeToString(deterministic=True)


def from_payload(payload: bytes) -> Prototypes:
    """Return the prototypes of a stored upload."""
    return prototypes_from_pb(pb.Prototypes.FromString(payload))


def _has_upload(database: Database, job: Job, payload: bytes) -> bool:
    try:
        return job_rows.payload(database, job.job_id, job.round) == payload
    except NotYours:
        return False
