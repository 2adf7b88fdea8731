"""W3C Trace Context: what is no valid header is no trace, and what we write others can read."""

import pytest

from isthmus.proto.trace import TraceContext

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_header_is_read_as_it_was_written() -> None:
    context = TraceContext.new()
    assert TraceContext.read(context.header) == context
    assert TraceContext.read(context.child().header).trace_id == context.trace_id  # type: ignore[union-attr]
    assert context.child().span_id != context.span_id
    assert TraceContext.read(f"00-{TRACE}-{SPAN}-03") == TraceContext(TRACE, SPAN, sampled=True)
    assert TraceContext.read(f"01-{TRACE}-{SPAN}-00-more") == TraceContext(TRACE, SPAN), "a later version may add"


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"00",
        "",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"01-{TRACE}-{SPAN}-01-{'x' * 200}",
    ],
)
def test_what_is_no_header_begins_a_new_trace(header: object) -> None:
    assert TraceContext.read(header) is None
