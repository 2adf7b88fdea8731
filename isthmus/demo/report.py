"""The HTML report: one self-contained file without scripts or network access."""

import base64
from pathlib import Path

import jinja2

from isthmus import __version__
from isthmus.demo import pictures
from isthmus.demo.outcome import WAYS, DemoOutcome, readable_bytes, readable_seconds


def render_report(outcome: DemoOutcome, sentence: str) -> str:
    """Return the whole page as text, with ``sentence`` on top. Names from the data set are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isthmus.demo", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(bytes=readable_bytes, duration=readable_seconds, inline=_inline)
    return environment.get_template("report.html").render(
        version=__version__,
        outcome=outcome,
        sentence=sentence,
        ways=WAYS,
        by_class=[pictures.by_class(client, outcome.classes) for client in outcome.clients],
        accuracy=pictures.accuracy(outcome.clients),
        traffic=pictures.bytes_per_clip(outcome.clients),
        selected=pictures.selected(outcome.clients, outcome.classes),
        prototypes=[pictures.prototypes(client, outcome.classes) for client in outcome.clients],
        kept=[pictures.kept(clip) for clip in outcome.kept],
        losses=pictures.losses({name: values for name, values in outcome.losses.items() if values}),
        wall_times=pictures.wall_times(outcome.stages),
    )


def write_report(outcome: DemoOutcome, path: Path, sentence: str) -> None:
    path.write_text(render_report(outcome, sentence), encoding="utf-8")


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
