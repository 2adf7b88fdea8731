"""``isthmus experiment``: measured comparisons. Each writes a JSON result and a Markdown table."""

import logging

from isthmus.command_line import App
from isthmus.experiments.elastic.cli import add_commands as add_elastic
from isthmus.experiments.elastic.papers_cli import add_commands as add_papers
from isthmus.experiments.generation.cli import add_commands as add_generation
from isthmus.experiments.link_cli import add_commands as add_link
from isthmus.experiments.personal.cli import add_commands as add_personal

app = App(
    "isthmus experiment",
    help="Compare methods over seeds, and write the results to files.\n\n"
    "Each comparison can be stopped and run again: finished cells are kept.",
    extra="demo",
    log_level=logging.WARNING,
)
add_personal(app)
add_elastic(app)
add_papers(app)
add_generation(app)
add_link(app)
