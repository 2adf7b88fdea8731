"""The work of ``isthmus cloud page``."""

import secrets

import typer

from isthmus.cloud.page.app import cloud_page
from isthmus.page.serve import serve


def page(metrics_port: int, port: int) -> None:
    """Serve the page until the process is interrupted. Raises InvalidInput if its port is taken."""

    def say(address: str) -> None:
        typer.echo(f"the page of this service: {address}")
        typer.echo("it answers on this machine alone; keep the address to yourself; press Ctrl-C to end", err=True)

    serve(cloud_page(metrics_port), secrets.token_urlsafe(24), port, say)
