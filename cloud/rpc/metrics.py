"""Metrics for Prometheus, in a registry of the server's own."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.cloud.elastic.serve.live import LiveEngine


class Metrics:
    """The metrics of one server. Each server has its own registry, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "isthmus_calls", "Calls that ended, by method and status.", ["method", "status"], registry=self.registry
        )
        self.seconds = Histogram("isthmus_call_seconds", "Duration of calls.", ["method"], registry=self.registry)
        self.in_progress = Gauge("isthmus_calls_in_progress", "Calls under way.", ["method"], registry=self.registry)
        self.frames = Counter(
            "isthmus_frames", "Feature frames answered or refused.", ["outcome"], registry=self.registry
        )
        self.frame_seconds = Histogram(
            "isthmus_frame_seconds",
            "Time to answer a feature frame.",
            registry=self.registry,
            buckets=(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1),
        )
        self.bytes_sent = Counter("isthmus_student_bytes", "Bytes of students sent.", registry=self.registry)
        self.worker_restarts = Counter("isthmus_worker_restarts", "Workers that died.", registry=self.registry)

    def watch_elastic(self, live: LiveEngine) -> None:
        """Also report the counts of elastic serving from now on."""
        self.registry.register(_Elastic(live))


class _Elastic(Collector):
    """Reads the engine's own counts on each scrape."""

    def __init__(self, live: LiveEngine) -> None:
        self._live = live

    def collect(self) -> Iterable[Metric]:
        queries = CounterMetricFamily(
            "isthmus_elastic_queries", "Images by task and outcome.", labels=["task", "outcome"]
        )
        batches = CounterMetricFamily("isthmus_elastic_batches", "Batches in which a task ran.", labels=["task"])
        for task, counted in self._live.all_statistics().items():
            for outcome, count in counted.outcomes.items():
                queries.add_metric([task, outcome.value], count)
            batches.add_metric([task], counted.batches)
        yield queries
        yield batches
        yield GaugeMetricFamily("isthmus_elastic_waiting", "Images waiting for a batch.", value=self._live.waiting())
