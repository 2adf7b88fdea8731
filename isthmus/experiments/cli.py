"""``isthmus experiment``: measured comparisons, each writing a JSON result and a Markdown table."""

import typer

from isthmus.experiments.elastic.cli import elastic_policies, warmed_models
from isthmus.experiments.personal.cli import cost_command, paper_command, people_command

app = typer.Typer(
    no_args_is_help=True,
    help="Measured comparisons over seeds. Each can be stopped and run again: finished cells are kept.",
)


@app.callback()
def group() -> None:
    """Measured comparisons over seeds."""


app.command("paper")(paper_command)
app.command("people")(people_command)
app.command("cost")(cost_command)
app.command("elastic")(elastic_policies)
app.command("warmup")(warmed_models)
