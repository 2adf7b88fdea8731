"""Generation as Prometheus reads it: requests by what became of them, tokens, and the times of answers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.cloud.generation.scheduling.request import Outcome

if TYPE_CHECKING:  # a server for devices alone has no tokenizer installed
    from isthmus.cloud.generation.serve.serving import Answering

_TIMES = {
    "queue": ("queue_seconds", "Time from arrival to the first step."),
    "first_token": ("first_token_seconds", "Time from arrival to the first token."),
    "per_token": ("per_token_seconds", "Time per token after the first."),
    "request": ("request_seconds", "Time from arrival to the last token."),
    "pause": ("pause_seconds", "Time for which a request that was moved was at no replica."),
}


class GenerationCollector(Collector):
    """Reads the counts of what answers, at each scrape."""

    def __init__(self, answering: "Answering") -> None:
        self._answering = answering

    def collect(self) -> Iterable[Metric]:
        """Yield the families of metrics."""
        numbers = self._answering.numbers()
        requests = CounterMetricFamily("isthmus_generate_requests", "Requests that ended.", labels=["outcome"])
        for outcome in Outcome:
            requests.add_metric([outcome.value], numbers.outcomes[outcome])
        yield requests
        moves = CounterMetricFamily("isthmus_generate_moves", "Requests moved between replicas.", labels=["how"])
        for how in ("blocks", "tokens", "failed"):
            moves.add_metric([how], numbers.moves[how])
        yield moves
        yield CounterMetricFamily("isthmus_generate_tokens", "Tokens drawn.", value=numbers.tokens)
        yield CounterMetricFamily(
            "isthmus_generate_shared_tokens",
            "Prompt tokens that another request that begins alike had computed.",
            value=numbers.shared_tokens,
        )
        for name, text, value in (
            ("under_way", "Requests that wait or have a row.", numbers.under_way),
            ("queue_length", "Requests that wait for their first step.", numbers.waiting),
            ("free_blocks", "Free blocks of the KV cache.", numbers.free_blocks),
            ("kept_blocks", "Free blocks that hold the beginning of a prompt.", numbers.kept_blocks),
        ):
            yield GaugeMetricFamily(f"isthmus_generate_{name}", text, value=value)
        for key, seen in numbers.times.items():
            name, text = _TIMES[key]
            yield HistogramMetricFamily(f"isthmus_generate_{name}", text, buckets=seen.cumulative(), sum_value=seen.sum)
