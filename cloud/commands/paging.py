"""The work of ``isthmus cloud page``."""

import secrets
from pathlib import Path

import typer

from isthmus.cloud.page.app import cloud_page
from isthmus.page.serve import serve
from isthmus.page.student import FILES, BrowserStudent


def page(metrics_port: int, port: int, release: Path | None) -> None:
    """Serve the page until the process is interrupted.

    Raises InvalidInput if its port is taken, and ValueError or ReleaseError for a release without a base student.
    """
    student = None if release is None else _base_student(release)

    def say(address: str) -> None:
        typer.echo(f"the page of this service: {address}")
        typer.echo("it answers on this machine alone; keep the address to yourself; press Ctrl-C to end", err=True)

    serve(cloud_page(metrics_port, student), secrets.token_urlsafe(24), port, say)


def _base_student(root: Path) -> BrowserStudent:
    from isthmus.distill.release import Release  # It loads torch.

    release = Release.open(root)
    missing = [name for name in FILES if not (release.base_dir / f"{name}.onnx").is_file()]
    if missing:
        raise ValueError(f"{root} has no base student yet: 'isthmus distill student --release {root}' makes it")
    recipe = release.recipe
    return BrowserStudent(
        release.base_dir, f"the base student of {recipe.name}", recipe.classes, recipe.input.to_json()
    )
