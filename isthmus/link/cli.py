"""``isthmus link``: pass TCP connections on under a script of faults."""

from pathlib import Path
from typing import Annotated

from typer import Option

from isthmus.command_line import App

app = App("isthmus link", help="Pass connections on, with the faults of a real network.", extra="link")


@app.command("isthmus link", example="isthmus link --listen 127.0.0.1:50052 --to 127.0.0.1:50051 --script tunnel.yaml")
def link(
    listen: Annotated[str, Option(help="Address to listen on, HOST:PORT. Port 0 takes a free one.")],
    to: Annotated[str, Option(help="Address to which connections are passed on, HOST:PORT.")],
    script: Annotated[Path, Option(help="YAML or JSON file with the phases of each direction.")],
    seed: Annotated[int | None, Option(help="Seed of every random choice. Default: the script's.")] = None,
    open_to_network: Annotated[
        bool,
        Option("--open-to-network", help="Allow --listen on an address that other machines can reach."),
    ] = False,
) -> None:
    """Pass TCP connections on like a link with faults: slow, late, stalled, cut, half-open, damaged.

    Needs a server at --to, and a script. Connect the device to --listen in place of the server. Prints each fault on
    stderr, and at the end what has passed, until it is interrupted. Writes no file.

    The script has a list of phases for each direction, up (to the server) and down. A phase has a length, for_s, and
    any of rate_bytes_s, trace (a Mahimahi packet-delivery trace), delay_ms, jitter_ms, loss, stall, half_open, cut,
    cut_at_byte, cut_every_bytes, corrupt_every_bytes, refuse and connect_delay_ms. The same script and seed cause the
    same faults again.
    """
    from isthmus.link.running import run

    run(listen, to, script, seed, open_to_network=open_to_network)
