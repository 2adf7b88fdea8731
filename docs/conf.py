"""Configuration of the documentation site: ``make docs``. Generated parts of pages come from reference_pages.py."""

import logging
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference_pages  # noqa: E402  (needs the path above)

from isthmus import __version__  # noqa: E402

logging.getLogger("alembic").setLevel(logging.WARNING)  # else it logs every plugin among the warnings

project = "Isthmus"
author = "The authors of Isthmus"
copyright = "The authors of Isthmus, Apache-2.0"
release = __version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "decisions/0000-template.md"]

myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # results and records start at any level
highlight_language = "none"
add_module_names = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"Isthmus {release}"
html_static_path: list[str] = []
html_copy_source = False
html_theme_options = {"footer_icons": []}


def setup(app):  # type: ignore[no-untyped-def]
    """Connect the generator: it fills in the marked parts of a page, and unlinks files outside the site."""
    app.connect("source-read", reference_pages.fill_in)
    return {"parallel_read_safe": True}
