"""Tables on the terminal, and as plain rows in a pipe."""

import sys
from collections.abc import Iterable, Sequence

import typer

_PIPE_COLUMNS = 200
"""Width of a table that is written to a file or a pipe."""


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: bool = False,
    tabs_in_pipes: bool = False,
) -> None:
    """Print a table. Cells are shown as they are: square brackets in a name are no markup.

    ``right`` aligns every column but the first to the right. With ``tabs_in_pipes``, output to a file or a pipe is the
    rows alone, with tabs between cells, for another program.
    """
    if tabs_in_pipes and not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title), title_justify="left")
    for position, header in enumerate(headers):
        table.add_column(Text(header), justify="right" if right and position else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_COLUMNS)).print(table)
