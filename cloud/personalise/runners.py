"""A worker's runners, one per release: that of its own --release, and those of releases that it fetches."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from isthmus.cloud.offers.offer import Offer, offer_of
from isthmus.cloud.personalise.learning import Learning
from isthmus.cloud.personalise.runner import Runner
from isthmus.cloud.releases import files
from isthmus.cloud.releases.copies import Copies
from isthmus.cloud.store import releases
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import Corrupt

log = logging.getLogger(__name__)

MOST_OPEN_BYTES: Final = 2 << 30
"""Bytes of weights that stay in memory of releases that were fetched. A release's other files are memory-mapped."""


@dataclass(frozen=True)
class Opened:
    """A release that is open: its folder, what it offers, and the learning on it."""

    folder: Path
    offer: Offer
    learning: Learning


class Runners:
    """Opens releases when a job needs them, and lets go of those that were used the longest time ago.

    ``run_on`` makes the runner of a release. ``own``: the folder of the worker's --release, which stays open.
    """

    def __init__(
        self,
        database: Database,
        copies: Copies,
        own: Path,
        run_on: Callable[[Opened], Runner],
        *,
        most_bytes: int = MOST_OPEN_BYTES,
    ) -> None:
        self._database = database
        self._copies = copies
        self._own_folder = own
        self._run_on = run_on
        self._most_bytes = most_bytes
        self._fetched: OrderedDict[str, tuple[Runner, int]] = OrderedDict()

    @property
    def own_id(self) -> str:
        """Id of the worker's own release. Raises Unusable if its files were changed, ReleaseError if it is broken."""
        return self._own.offer.release_hash

    def of(self, release_id: str) -> Runner:
        """Return the runner of a release; that of the worker's own one if nobody has this release any more.

        Raises Corrupt if a file of the release is damaged or gone, or if this version cannot open it, StorageFull, and
        Unavailable.
        """
        if release_id == self.own_id:
            return self._own
        known = self._fetched.get(release_id)
        if known is None:
            row = releases.get(self._database, release_id)
            if row is None or not row.stored:
                return self._own
            log.info("release %s is fetched, %d bytes", release_id, row.size_bytes)
            runner = self._open_fetched(release_id, self._copies.folder(row))
            weights = sum(file.size_bytes for path, file in row.files.items() if path.endswith(".safetensors"))
            known = self._fetched[release_id] = (runner, weights)
            self._let_go()
        self._fetched.move_to_end(release_id)
        return known[0]

    @cached_property
    def _own(self) -> Runner:
        files.check(self._database, self._own_folder)
        return self._open(self._own_folder)

    def _let_go(self) -> None:
        while len(self._fetched) > 1 and sum(weights for _, weights in self._fetched.values()) > self._most_bytes:
            release_id, _ = self._fetched.popitem(last=False)
            self._copies.let_go(release_id)

    def _open_fetched(self, release_id: str, folder: Path) -> Runner:
        from isthmus.distill.release import ReleaseError

        try:
            return self._open(folder)
        except ReleaseError as error:
            self._copies.let_go(release_id)
            # Devices see the reason why their jobs wait, and need not see this machine's paths.
            log.error("release %s cannot be opened: %s", release_id, error)
            raise Corrupt(
                f"a worker of another version cannot open release {release_id}: the server's operator must start "
                "workers of the version that made it"
            ) from error

    def _open(self, folder: Path) -> Runner:
        # Imported at the first job, so that a worker without work stays small.
        from isthmus.cloud.personalise.distilling import DistillLearning
        from isthmus.distill.release import Release

        release = Release.open(folder)
        return self._run_on(Opened(folder, offer_of(release), DistillLearning(release)))
