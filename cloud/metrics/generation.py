"""Generation as Prometheus reads it: requests by what became of them, tokens, and the times of answers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.cloud.generation.scheduling.request import Outcome

if TYPE_CHECKING:  # a server for devices alone has no tokenizer installed
    from isthmus.cloud.generation.serve.live import LiveGeneration

_TIMES = {
    "queue": ("queue_seconds", "Time from arrival to the first step."),
    "first_token": ("first_token_seconds", "Time from arrival to the first token."),
    "per_token": ("per_token_seconds", "Time per token after the first."),
    "request": ("request_seconds", "Time from arrival to the last token."),
}


class GenerationCollector(Collector):
    """Reads the engine's own counts at each scrape."""

    def __init__(self, live: "LiveGeneration") -> None:
        self._live = live

    def collect(self) -> Iterable[Metric]:
        """Yield the families of metrics."""
        requests = CounterMetricFamily("isthmus_generate_requests", "Requests that ended.", labels=["outcome"])
        ended = self._live.outcomes()
        for outcome in Outcome:
            requests.add_metric([outcome.value], ended[outcome])
        yield requests
        yield CounterMetricFamily("isthmus_generate_tokens", "Tokens drawn.", value=self._live.tokens)
        under_way, waiting, free_blocks = self._live.load()
        for name, text, value in (
            ("under_way", "Requests that wait or have a row.", under_way),
            ("queue_length", "Requests that wait for their first step.", waiting),
            ("free_blocks", "Free blocks of the KV cache.", free_blocks),
        ):
            yield GaugeMetricFamily(f"isthmus_generate_{name}", text, value=value)
        for key, seen in self._live.times().items():
            name, text = _TIMES[key]
            yield HistogramMetricFamily(f"isthmus_generate_{name}", text, buckets=seen.cumulative(), sum_value=seen.sum)
