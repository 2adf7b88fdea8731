"""W3C Trace Context: the identity of a trace, as a call's metadata carries it from one machine to the next.

https://www.w3.org/TR/trace-context/, version 00. The ids are random and say nothing about a device or its user.
"""

import re
import secrets
import sys
from dataclasses import dataclass, replace
from typing import Final

KEY: Final = "traceparent"
"""Name of the metadata entry."""
_HEADER: Final = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.{0,128})?")


@dataclass(frozen=True)
class TraceContext:
    """A place in a trace: the trace's id (32 hexadecimal digits), the span's (16), and whether others record it.

    >>> TraceContext.read("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").trace_id
    '0af7651916cd43dd8448eb211c80319c'
    >>> TraceContext.read("00-00000000000000000000000000000000-b7ad6b7169203331-01") is None
    True
    """

    trace_id: str
    span_id: str
    sampled: bool = False

    @staticmethod
    def new() -> "TraceContext":
        """Return the beginning of a new trace."""
        return TraceContext(f"{secrets.randbits(128) or 1:032x}", f"{secrets.randbits(64) or 1:016x}")

    @staticmethod
    def read(header: object) -> "TraceContext | None":
        """Return what a header says; None if it is no valid one, as the standard asks."""
        if not isinstance(header, str) or (found := _HEADER.fullmatch(header)) is None:
            return None
        if (found[4] and header.startswith("00")) or not int(found[1], 16) or not int(found[2], 16):
            return None
        return TraceContext(found[1], found[2], bool(int(found[3], 16) & 1))

    def child(self) -> "TraceContext":
        """Return another span of the same trace."""
        return replace(self, span_id=f"{secrets.randbits(64) or 1:016x}")

    @property
    def header(self) -> str:
        """The text for a call's metadata."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def outgoing() -> TraceContext:
    """Return the context to send with a call: the program's own span if it uses OpenTelemetry, else a new trace."""
    api = sys.modules.get("opentelemetry.trace")
    if api is not None:
        span = api.get_current_span().get_span_context()
        if span.is_valid:
            return TraceContext(f"{span.trace_id:032x}", f"{span.span_id:016x}", bool(span.trace_flags & 1))
    return TraceContext.new()
