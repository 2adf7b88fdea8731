"""Metrics of calls and of feature frames, in a registry of the server's own.

Calls have the names and labels that gRPC's Prometheus interceptors of other languages use, so that boards made for
these show them: ``grpc_server_started_total``, ``grpc_server_handled_total``, ``grpc_server_handling_seconds``.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import Collector

_CALL_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FRAME_SECONDS: Final = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1)


class Metrics:
    """The metrics of one server. Each server has its own registry, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        method = ["grpc_type", "grpc_service", "grpc_method"]
        self.started = Counter("grpc_server_started", "Calls that began.", method, registry=registry)
        self.handled = Counter(
            "grpc_server_handled", "Calls that ended, by status.", [*method, "grpc_code"], registry=registry
        )
        self.seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from a call's arrival to its end.",
            method,
            buckets=_CALL_SECONDS,
            registry=registry,
        )
        frames = Counter(
            "isthmus_frames",
            "Feature frames: answered, dropped because the deadline left no time, or refused for their content.",
            ["outcome"],
            registry=registry,
        )
        self.frames: Final = {each: frames.labels(each) for each in ("answered", "dropped", "refused")}
        self.frame_seconds = Histogram(
            "isthmus_frame_seconds", "Time to answer a feature frame.", buckets=_FRAME_SECONDS, registry=registry
        )
        self.bytes_sent = Counter("isthmus_student_bytes", "Bytes of students sent.", registry=registry)
        self.worker_restarts = Counter("isthmus_worker_restarts", "Workers that died.", registry=registry)
        self.of = cache(lambda name: Method(self, name))
        """The metrics of a method by its full name. There are as many as the services have methods."""

    def watch(self, collector: Collector) -> None:
        """Also report what ``collector`` finds at each scrape."""
        self.registry.register(collector)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Also report ``value()`` at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(value)


class Method:
    """The metrics of one method, found once: a look-up by labels costs more than counting."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        service, _, method = name.removeprefix("/").rpartition("/")
        labels = (kind_of(name), service, method)
        self.started = metrics.started.labels(*labels)
        self.seconds = metrics.seconds.labels(*labels)
        self.handled = cache(lambda code: metrics.handled.labels(*labels, code))
        # Visible from the first call on: an alert cannot compare with a series that is not there yet.
        self.handled("OK")


_KINDS: Final[dict[str, str]] = {}


def kind_of(method: str) -> str:
    """Return how a method streams, by its full name: unary, client_stream, server_stream or bidi_stream."""
    return _KINDS.get(method, "unary")


def know(files: Iterable[Any]) -> None:
    """Learn from protobuf's file descriptors which methods stream, for the label ``grpc_type``."""
    for file in files:
        for service in file.services_by_name.values():
            for method in service.methods:
                _KINDS[f"/{service.full_name}/{method.name}"] = _kind(method.client_streaming, method.server_streaming)


def _kind(client: bool, server: bool) -> str:
    if client and server:
        return "bidi_stream"
    return "client_stream" if client else "server_stream" if server else "unary"
