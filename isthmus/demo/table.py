"""The table that the terminal shows at the end."""

from rich.table import Table
from rich.text import Text

from isthmus.demo.outcome import DemoOutcome, readable_bytes


def closing_table(outcome: DemoOutcome) -> Table:
    """Return a table with one row per client and way of answering. The caption gives the size of a raw clip."""
    table = Table(title="Isthmus: the whole loop", title_justify="left", caption_justify="left")
    for column in ("client", "who answers"):
        table.add_column(column)
    for column in ("right", "accuracy", "bytes up", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for client in outcome.clients:
        for index, way in enumerate(client.answering):
            table.add_row(
                Text((client.name, ", ".join(client.own_classes))[index] if index < 2 else ""),
                way.name,
                f"{way.right}/{way.clips}",
                f"{100 * way.accuracy:.1f} %",
                readable_bytes(way.bytes_up) if way.bytes_up else "none",
                "" if way.median_ms is None else f"{way.median_ms:.1f}",
                end_section=index == len(client.answering) - 1,
            )
    raw = ", ".join(f"{client.name} {readable_bytes(client.raw_bytes_per_clip)}" for client in outcome.clients)
    sent = ", ".join(f"{c.name} {len(c.sizes_K)} ({readable_bytes(c.prototype_bytes)})" for c in outcome.clients)
    down = ", ".join(
        f"{c.name} {readable_bytes(c.student_bytes)} (whole files: {readable_bytes(c.whole_student_bytes)})"
        for c in outcome.clients
    )
    verdicts = "".join(f"\nThe new student of {client.name} was {client.verdict}." for client in outcome.clients)
    table.caption = Text(
        f"Bytes and milliseconds are per clip. A raw clip: {raw}. Prototypes sent: {sent}. Students fetched: {down}."
        f"{verdicts}"
    )
    return table
