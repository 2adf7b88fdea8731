"""The work of ``isthmus cloud serve``: run the server until a signal stops it."""

import asyncio
import signal
import sys

import torch

from isthmus.cloud import logs
from isthmus.cloud.garbage import spare_what_is_there
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings, joined, split_listen
from isthmus.extensions import load_extensions


def serve(settings: CloudSettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises IsthmusError, ReleaseError, ValueError or OSError if it cannot start."""
    logs.configure(settings.log_level, settings.log_format)
    load_extensions()
    asyncio.run(_serve(settings))


async def _serve(settings: CloudSettings) -> None:
    # Heads are tiny: more threads would only get in each other's way.
    torch.set_num_threads(1)
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    server = Server(settings, when_ready=spare_what_is_there)
    port = await server.start()
    if server.generation is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.generation.read_drained)
    print(f"listening on {joined(split_listen(settings.listen)[0], port)}", flush=True)
    if server.http_port is not None and settings.http is not None:
        print(f"HTTP on {joined(split_listen(settings.http)[0], server.http_port)}", file=sys.stderr, flush=True)
    if server.metrics_port is not None:
        print(f"metrics on port {server.metrics_port}", file=sys.stderr, flush=True)
    try:
        await stop.wait()
    finally:
        await server.stop()
