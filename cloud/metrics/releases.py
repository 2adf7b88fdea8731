"""Releases as Prometheus reads them: to which share of the devices each is offered, and how many devices use it.

All servers of one database report the same, so a query over several servers takes ``max``, not ``sum``.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.cloud.offers.rollout import Record
from isthmus.cloud.store import releases
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import IsthmusError

log = logging.getLogger(__name__)

_FRESH_S: Final = 2.0


class ReleaseCollector(Collector):
    """Reads releases from the database, at most every two seconds. Without it, it reports what it read last."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._read_s = float("-inf")
        self._records: list[Record] = []
        self._users: dict[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        """Yield the families of metrics."""
        if self._clock() - self._read_s >= _FRESH_S:
            self._read_s = self._clock()
            try:
                self._records, self._users = releases.records(self._database), releases.users(self._database)
            except IsthmusError as error:
                log.warning("releases are not known at the moment: %s", error)
        share = GaugeMetricFamily(
            "isthmus_release_offered_share",
            "Share of the devices to which a release is offered, named devices left out; 0 if it was withdrawn.",
            labels=["release"],
        )
        for record in self._records:
            share.add_metric([record.release_id], record.share)
        using = GaugeMetricFamily(
            "isthmus_release_devices",
            "Devices by the release of the student that they fetched or asked with last.",
            labels=["release"],
        )
        for release_id in sorted({*self._users, *(record.release_id for record in self._records)} - {""}):
            using.add_metric([release_id], self._users.get(release_id, 0))
        using.add_metric(["unknown"], self._users.get("", 0))
        yield from (share, using)
