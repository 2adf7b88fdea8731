"""A study's result as one Markdown file, its pictures, and one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from isthmus import __version__
from isthmus.data.files import write_atomically
from isthmus.experiments.personal.findings.tables import Table


@dataclass(frozen=True)
class Section:
    """Part of a report. ``pictures``: file name without ending -> PNG bytes."""

    title: str
    tables: tuple[Table, ...]
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    text: str = ""


def picture_name(name: str, who: str) -> str:
    """Return a picture's file name: "guard" for ", users of 2 classes" is guard-users-of-2-classes."""
    return f"{name}{who.replace(', ', '-').replace(' ', '-')}"


def markdown(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.text:
            lines += [section.text, ""]
        lines += [table.markdown() for table in section.tables]
        lines += [f"![{name}](pictures/{name}.png)\n" for name in section.pictures]
    return "\n".join(lines).rstrip() + "\n"


def write(out: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> list[Path]:
    """Write ``result.md``, ``report.html`` and ``pictures/``. Returns the first two paths."""
    for section in sections:
        for name, png in section.pictures.items():
            write_atomically(out / "pictures" / f"{name}.png", png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isthmus.experiments.personal.findings", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["inline"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    page = environment.get_template("report.html").render(
        version=__version__, title=title, facts=facts, sections=sections
    )
    write_atomically(out / "result.md", markdown(title, facts, sections))
    write_atomically(out / "report.html", page)
    return [out / "result.md", out / "report.html"]
