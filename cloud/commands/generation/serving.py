"""The work of ``isthmus generate serve``: serve one language model over HTTP until a signal stops it."""

import asyncio
import signal

from isthmus.cloud import logs
from isthmus.cloud.commands.generation.options import GenerateServeOptions
from isthmus.cloud.garbage import spare_what_is_there
from isthmus.cloud.http.calls import Door
from isthmus.cloud.http.openai import openai_app
from isthmus.cloud.http.server import HttpServer
from isthmus.cloud.replicas.opening import opened
from isthmus.cloud.settings import is_loopback, joined, split_listen
from isthmus.command_line import key_in
from isthmus.data.files import write_atomically


def serve(asked: GenerateServeOptions) -> None:
    """Serve until SIGINT or SIGTERM. Raises InvalidInput, ValueError or OSError if it cannot start."""
    logs.configure("info")
    host, _ = split_listen(asked.http)
    if not asked.served:
        raise ValueError("give either MODEL_DIR or --generate-upstream URL")
    if (asked.tls_cert is None) != (asked.tls_key is None):
        raise ValueError("TLS needs both --tls-cert and --tls-key")
    if not is_loopback(host) and (asked.tls_cert is None or asked.key_file is None):
        raise ValueError(
            f"{host} can be reached from other machines, so the server also needs --key-file, --tls-cert and "
            "--tls-key. Give these, or listen on 127.0.0.1."
        )
    asyncio.run(_serve(asked, key_in(asked.key_file)))


async def _serve(asked: GenerateServeOptions, key: str | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    host, port = split_listen(asked.http)
    async with opened(asked) as found:
        loop.add_signal_handler(signal.SIGHUP, found.read_drained)
        app = openai_app(found.answering, Door(key), moves=found.moves, move_key=found.move_key)
        server = HttpServer(app, host, port, tls_cert=asked.tls_cert, tls_key=asked.tls_key)
        try:
            port = await server.start()
            spare_what_is_there()
            if asked.port_file is not None:
                write_atomically(asked.port_file, joined(host, port) + "\n")
            print(f"listening on {joined(host, port)}", flush=True)
            await stop.wait()
        finally:
            await server.stop()
