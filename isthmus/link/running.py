"""The work of ``isthmus link``."""

import asyncio
import contextlib
import signal
from dataclasses import asdict, replace
from ipaddress import ip_address
from pathlib import Path

import typer

from isthmus.link.proxy import FaultyLink
from isthmus.link.script import Script, read_script


def run(listen: str, to: str, script: Path, seed: int | None, *, open_to_network: bool) -> None:
    """Pass connections on until SIGINT or SIGTERM. Raises ValueError and OSError."""
    here, there = _address(listen, "--listen"), _address(to, "--to")
    if there[1] == 0:
        raise ValueError("--to needs a port above 0")
    if not open_to_network and not _is_loopback(here[0]):
        raise ValueError(
            f"--listen {here[0]}: other machines can reach this address, and everyone who does is passed on to {to}; "
            "add --open-to-network if that is meant"
        )
    read = read_script(script)
    asyncio.run(_serve(here, there, read if seed is None else replace(read, seed=seed)))


async def _serve(here: tuple[str, int], there: tuple[str, int], script: Script) -> None:
    link = FaultyLink(script, *there, on_event=lambda at_s, what: typer.echo(f"{at_s:9.3f} s  {what}", err=True))
    await link.start(*here)
    typer.echo(f"passing {link.address} on to {there[0]}:{there[1]}; press Ctrl-C to end", err=True)
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    with contextlib.suppress(asyncio.CancelledError):
        await over.wait()
    await link.close()
    for name, count in asdict(link.counts).items():
        typer.echo(f"{name.replace('_', ' ')}: {count}")


def _address(text: str, option: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{option} {text!r}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
