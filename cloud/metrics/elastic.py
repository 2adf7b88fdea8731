"""Elastic serving as Prometheus reads it: every query by what became of it, its times, batches and gammas.

In each scrape, and for each task, exactly:

    arrivals = in time + late + dropped before compute + failed + pending
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome
from isthmus.cloud.elastic.serve.live import LiveEngine

if TYPE_CHECKING:
    # A server for devices alone does not need timm.
    from isthmus.cloud.elastic.variants.pool import Pool

_NAMES: Final = {
    **dict.fromkeys(IN_TIME, "in_time"),
    Outcome.LATE: "late",
    Outcome.EVICTED: "dropped",
    Outcome.FAILED: "failed",
}


class ElasticCollector(Collector):
    """Reads the engine's own counts, all of one moment, at each scrape."""

    def __init__(self, live: LiveEngine, variants: "Pool | None" = None) -> None:
        self._live = live
        self._variants = variants

    def collect(self) -> Iterable[Metric]:
        """Yield the families of metrics."""
        seen = self._live.snapshot()
        arrivals = CounterMetricFamily("isthmus_elastic_arrivals", "Images that arrived, by task.", labels=["task"])
        queries = CounterMetricFamily(
            "isthmus_elastic_queries",
            "Images that ended: in time, late, dropped before compute, or failed in their batch.",
            labels=["task", "outcome"],
        )
        pending = GaugeMetricFamily("isthmus_elastic_pending", "Images that wait or run, by task.", labels=["task"])
        batches = CounterMetricFamily("isthmus_elastic_batches", "Batches in which a task ran.", labels=["task"])
        queue = _histogram("isthmus_elastic_queue_seconds", "Time from arrival to the batch, of images that ran.")
        request = _histogram("isthmus_elastic_request_seconds", "Time from arrival to the answer.")
        earned = CounterMetricFamily(
            "isthmus_elastic_utility_earned", "Expected utility of the images answered in time.", labels=["task"]
        )
        offered = CounterMetricFamily(
            "isthmus_elastic_utility_offered",
            "Expected utility of all images that ended, had each been in time at its best gamma.",
            labels=["task"],
        )
        for task, counted in seen.tasks.items():
            earned.add_metric([task], counted.earned)
            offered.add_metric([task], counted.offered)
            ended = dict.fromkeys(("in_time", "late", "dropped", "failed"), 0)
            for outcome, count in counted.outcomes.items():
                ended[_NAMES[outcome]] += count
            ended["dropped"] += counted.overloaded
            for name, count in ended.items():
                queries.add_metric([task, name], count)
            waits = seen.pending.get(task, 0)
            arrivals.add_metric([task], sum(ended.values()) + waits)
            pending.add_metric([task], waits)
            batches.add_metric([task], counted.batches)
            queue.add_metric([task], buckets=counted.queued.cumulative(), sum_value=counted.queued.sum)
            request.add_metric([task], buckets=counted.taken.cumulative(), sum_value=counted.taken.sum)
        yield from (arrivals, queries, pending, batches, queue, request, earned, offered)
        gammas = CounterMetricFamily("isthmus_elastic_gamma_images", "Images that ran, by gamma.", labels=["gamma"])
        yield _filled(gammas, seen.gammas)
        experts = CounterMetricFamily(
            "isthmus_elastic_expert_images",
            "Images that ran, by experts per token; nothing if the model has none.",
            labels=["experts"],
        )
        yield _filled(experts, seen.experts)
        yield HistogramMetricFamily(
            "isthmus_elastic_batch_images",
            "Images per batch.",
            buckets=seen.batch_images.cumulative(),
            sum_value=seen.batch_images.sum,
        )
        yield HistogramMetricFamily(
            "isthmus_elastic_batch_seconds",
            "Time that a batch ran.",
            buckets=seen.batch_s.cumulative(),
            sum_value=seen.batch_s.sum,
        )
        yield GaugeMetricFamily("isthmus_elastic_queue_length", "Images waiting for a batch.", value=seen.waiting)
        yield GaugeMetricFamily("isthmus_elastic_executors", "Batches that can run at once.", value=seen.executors)
        yield GaugeMetricFamily(
            "isthmus_elastic_executors_wanted", "Executors that the load asks for.", value=seen.wanted
        )
        yield CounterMetricFamily(
            "isthmus_elastic_executor_restarts", "Executors that were lost and started again.", value=seen.restarts
        )
        yield GaugeMetricFamily("isthmus_elastic_executors_busy", "Batches that run.", value=seen.running)
        yield GaugeMetricFamily(
            "isthmus_elastic_pace", "Time of a batch as a multiple of what the profile says.", value=seen.pace
        )
        paces = GaugeMetricFamily(
            "isthmus_elastic_executor_pace",
            "Time of an executor's batch as a multiple of what the profile says.",
            labels=["executor"],
        )
        yield _filled(paces, seen.paces)
        if self._variants is not None:
            yield CounterMetricFamily(
                "isthmus_elastic_variant_loads",
                "Model variants that were loaded since the start.",
                value=self._variants.loads,
            )
            yield CounterMetricFamily(
                "isthmus_elastic_variant_removals",
                "Model variants that left memory to make room.",
                value=self._variants.removals,
            )
            yield GaugeMetricFamily(
                "isthmus_elastic_variant_bytes",
                "Bytes of the model variants in memory, over all executors.",
                value=self._variants.bytes,
            )


def _histogram(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=["task"])


_Family = TypeVar("_Family", CounterMetricFamily, GaugeMetricFamily)


def _filled(family: _Family, values: Mapping[int, float]) -> _Family:
    """Return the family with a value for each value of its one label."""
    for label, value in values.items():
        family.add_metric([str(label)], value)
    return family
