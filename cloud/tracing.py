"""Traces: where a call's time went, from the device's call through queue, batch and worker.

Every call belongs to a trace, which the log's lines name. Its spans are recorded only if an OpenTelemetry endpoint is
given (extra "otel"). Which traces are recorded depends on the trace's id alone: all parts of the cloud decide alike,
and no client can ask for more. A long stream has no open span: its opening is recorded, and then each piece of work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from isthmus.proto.errors import InvalidInput
from isthmus.proto.trace import TraceContext

Value = str | int | float | bool


@dataclass(frozen=True)
class _Here:
    """The span in which the current task works, and what records its children (None: nothing does)."""

    context: TraceContext
    traces: "Traces | None"


_HERE: ContextVar[_Here | None] = ContextVar("trace", default=None)


def current() -> TraceContext | None:
    """Return the span in which the current task or thread works, if there is one."""
    here = _HERE.get()
    return None if here is None else here.context


def past(name: str, took_s: float, *, ended_s: float, **attributes: Value) -> None:
    """Record a span of the current trace that took ``took_s`` and ended at ``ended_s`` (Unix seconds)."""
    here = _HERE.get()
    if here is not None and here.traces is not None:
        here.traces.record(name, here.context, took_s, ended_s, attributes)


class Traces:
    """Records spans, or nothing if it is made without a tracer."""

    def __init__(self, tracer: Any = None, close: Callable[[], None] = lambda: None) -> None:
        self._tracer = tracer
        self._close = close

    @contextmanager
    def span(self, name: str, parent: TraceContext | None = None, **attributes: Value) -> Iterator[None]:
        """Work in a span for the duration of the block. Without a ``parent`` it belongs to the current span."""
        before = _HERE.get()
        parent = parent or (before.context if before is not None else TraceContext.new())
        if self._tracer is None:
            _HERE.set(_Here(parent, None))
            try:
                yield
            finally:
                _HERE.set(before)
            return
        span = self._tracer.start_span(name, _as_remote(parent), attributes=attributes)
        _HERE.set(_Here(_context_of(span), self))
        try:
            yield
        except BaseException as error:
            _mark_failed(span, error)
            raise
        finally:
            span.end()
            # Not by a token: an abandoned stream is closed in another context.
            _HERE.set(before)

    def enter(self, name: str, parent: TraceContext | None, **attributes: Value) -> None:
        """Record that a stream was opened. What the current task does from now on belongs to its trace."""
        with self.span(name, parent or TraceContext.new(), **attributes):
            here = _HERE.get()
        _HERE.set(here)

    def record(
        self, name: str, parent: TraceContext, took_s: float, ended_s: float, attributes: dict[str, Value]
    ) -> None:
        """Record a span that has ended, see ``past``."""
        if self._tracer is not None:
            began_ns = int((ended_s - took_s) * 1e9)
            span = self._tracer.start_span(name, _as_remote(parent), attributes=attributes, start_time=began_ns)
            span.end(int(ended_s * 1e9))

    def close(self) -> None:
        """Send what is left. It blocks for a few seconds if the endpoint does not answer."""
        self._close()


OFF: Final = Traces()
"""Records nothing."""


def open_traces(endpoint: str | None, share: float, part: str) -> Traces:
    """Return what sends ``share`` of all traces to the OTLP endpoint (gRPC); OFF without an endpoint.

    ``part`` names this process, such as "isthmus-cloud". Raises InvalidInput if the extra "otel" is not installed.
    """
    if endpoint is None:
        return OFF
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
    except ModuleNotFoundError as error:
        raise InvalidInput(f"traces need the package {error.name!r}: pip install 'isthmus[otel]'") from None
    provider = TracerProvider(
        sampler=TraceIdRatioBased(share), resource=Resource.create({"service.name": part}), shutdown_on_exit=False
    )
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Traces(provider.get_tracer("isthmus"), provider.shutdown)


def _as_remote(context: TraceContext) -> Any:
    from opentelemetry import trace

    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if context.sampled else trace.TraceFlags.DEFAULT)
    span = trace.SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(trace.NonRecordingSpan(span))


def _context_of(span: Any) -> TraceContext:
    found = span.get_span_context()
    return TraceContext(f"{found.trace_id:032x}", f"{found.span_id:016x}", bool(found.trace_flags & 1))


def _mark_failed(span: Any, error: BaseException) -> None:
    from opentelemetry.trace import StatusCode

    # The type alone: messages may name files.
    span.set_status(StatusCode.ERROR, type(error).__name__)
