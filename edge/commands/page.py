"""The work of ``isthmus edge page``."""

from pathlib import Path

import typer

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.own_clips.store import person_folder
from isthmus.edge.page.app import device_page
from isthmus.page.serve import serve, token_in


def page(state: Path, person: str, port: int) -> None:
    """Serve the device's page until the process is interrupted. Raises IsthmusError or ValueError."""
    root = person_folder(state, person) if person else state
    if not root.is_dir():
        raise ValueError(f"{root} is no folder of a device: 'isthmus edge run --state {state} ...' makes one")
    device = DeviceState(root)

    def say(address: str) -> None:
        typer.echo(f"the page of this device: {address}")
        typer.echo("it answers on this machine alone; keep the address to yourself; press Ctrl-C to end", err=True)

    serve(device_page(device, person or root.name), token_in(root), port, say)
