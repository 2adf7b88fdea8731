"""What a server's services work with: database, files, keys, the release, and elastic serving.

All of it is opened before a port is bound. Opening blocks, so the server does it in a thread.
"""

import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from isthmus.cloud import continuity, own_release
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.identity import Gate
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.releases.catalogue import Catalogue
from isthmus.cloud.settings import CloudSettings
from isthmus.cloud.store import lock
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.errors import InvalidInput, IsthmusError


@dataclass(frozen=True)
class OpenRelease:
    """What the services for devices need."""

    signer: Signer
    catalogue: Catalogue
    gate: Gate
    base_student_id: str


@dataclass(frozen=True)
class Ground:
    """What the services need. The part of a service that is not offered is None."""

    shelf: Shelf
    roster: Roster
    release: OpenRelease | None
    elastic: Elastic | None
    inference_key: str | None
    """The key of clients that ask models: image tasks, or a language model."""


def open_ground(settings: CloudSettings, stack: AsyncExitStack) -> Ground:
    """Open everything; ``stack`` closes it again.

    Raises Locked if another server uses the database, InvalidInput (naming the way out) if the settings do not work
    here, and ReleaseError if the release is incomplete.
    """
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(settings.database_url)
    stack.callback(database.close)
    stack.callback(lock.acquire_folder(settings.state, "server").release)
    database.connect()
    stack.callback(lock.acquire(database, "server").release)
    was_empty = database.is_empty()
    database.migrate()
    shelf = Shelf(database, Artefacts(settings.artefacts_url))
    shelf.artefacts.check()
    continuity.same_database(database, settings.state, settings.signing_key_path, shelf.artefacts, was_empty=was_empty)
    continuity.mark(database, settings.state, shelf.artefacts)
    try:
        gate = Gate(settings.enrolment_key(), settings.max_devices, settings.max_enrolments_per_hour)
        inference_key = settings.elastic_key() or settings.generate_key()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"key file: {error}") from error
    release = None if settings.release is None else _open_release(settings, settings.release, shelf, gate)
    roster = Roster(database)
    roster.refresh()
    stack.callback(_last_words, roster)
    return Ground(shelf, roster, release, _open_elastic(settings, shelf, stack), inference_key)


def _open_release(settings: CloudSettings, folder: Path, shelf: Shelf, gate: Gate) -> OpenRelease:
    signer = continuity.same_key(shelf.database, settings.signing_key_path)
    base_student_id = own_release.open_own(shelf, signer, folder, time.time(), accept=settings.accept_release)
    return OpenRelease(signer, Catalogue(shelf.database), gate, base_student_id)


def _open_elastic(settings: CloudSettings, shelf: Shelf, stack: AsyncExitStack) -> Elastic | None:
    if settings.elastic is None:
        return None
    # A server for devices alone does not need timm.
    from isthmus.cloud.elastic.serve.host import open_elastic

    elastic = open_elastic(settings.elastic, shelf.database, shelf.artefacts)
    stack.callback(elastic.decoder.close)
    if elastic.warm is not None:
        stack.callback(elastic.warm.close)
    return elastic


def _last_words(roster: Roster) -> None:
    """Write what tenants have spent since the last time, if the database is there."""
    with suppress(IsthmusError):
        roster.refresh()
