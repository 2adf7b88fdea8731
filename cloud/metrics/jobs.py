"""Personalisations as Prometheus reads them: how many are in each stage, how long the oldest waits, how long they took.

All servers of one database report the same jobs, so a query over several servers takes ``max``, not ``sum``.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.cloud.histogram import Histogram
from isthmus.cloud.personalise import job_rows
from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import IsthmusError
from isthmus.proto.messages import Stage

log = logging.getLogger(__name__)

_BOUNDS_S: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0)
_FRESH_S: Final = 2.0


class JobCollector(Collector):
    """Reads the jobs from the database, at most every two seconds. Without the database it reports what it read last.

    Jobs that ended before this server started are in no counter, as is usual for counters.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._clock = clock
        self._read_s = float("-inf")
        self._since_s = database.now_s()
        self._seen: set[str] = set()
        self._stages: dict[str, tuple[int, float]] = {}
        self._devices = 0
        self._ended = dict.fromkeys((Stage.READY.value, Stage.FAILED.value), 0)
        self._took = Histogram(_BOUNDS_S)

    def collect(self) -> Iterable[Metric]:
        """Yield the families of metrics."""
        if self._clock() - self._read_s >= _FRESH_S:
            self._read_s = self._clock()
            try:
                self._read()
            except IsthmusError as error:
                log.warning("jobs are not known at the moment: %s", error)
        jobs = GaugeMetricFamily("isthmus_jobs", "Personalisations by stage.", labels=["stage"])
        oldest = GaugeMetricFamily(
            "isthmus_jobs_oldest_seconds",
            "Time since the last step of the job that has had none for longest, by stage.",
            labels=["stage"],
        )
        for stage in Stage:
            count, since_s = self._stages.get(stage.value, (0, 0.0))
            jobs.add_metric([stage.value], count)
            if not stage.ended:
                oldest.add_metric([stage.value], max(0.0, self._database.now_s() - since_s) if count else 0.0)
        ended = CounterMetricFamily("isthmus_jobs_ended", "Personalisations that ended, by stage.", labels=["stage"])
        for name, number in self._ended.items():
            ended.add_metric([name], number)
        yield from (jobs, oldest, ended)
        yield HistogramMetricFamily(
            "isthmus_job_seconds",
            "Time from a personalisation's start to its finished student.",
            buckets=self._took.cumulative(),
            sum_value=self._took.sum,
        )
        yield GaugeMetricFamily("isthmus_devices", "Devices that are enrolled.", value=self._devices)

    def _read(self) -> None:
        self._stages = job_rows.by_stage(self._database)
        self._devices = devices.count(self._database)
        now_s = self._database.now_s()
        for job in job_rows.ended_since(self._database, self._since_s):
            if job.job_id not in self._seen:
                self._seen.add(job.job_id)
                self._ended[job.stage.value] = self._ended.get(job.stage.value, 0) + 1
                if job.stage is Stage.READY:
                    self._took.note(max(0.0, job.updated_s - job.created_s))
        # Clocks of machines differ a little, so the last minute is read again; what was counted is known by its id.
        if now_s - self._since_s > 120.0:
            self._since_s = now_s - 60.0
            self._seen = {job.job_id for job in job_rows.ended_since(self._database, self._since_s)}
