"""The work of ``isthmus generate serve``: serve one language model over HTTP until a signal stops it."""

import asyncio
import signal

from isthmus.cloud import logs
from isthmus.cloud.commands.generation.options import GenerateServeOptions
from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.http.openai import openai_app
from isthmus.cloud.http.server import HttpServer
from isthmus.cloud.settings import is_loopback, joined, split_listen
from isthmus.command_line import key_in


def serve(asked: GenerateServeOptions) -> None:
    """Serve until SIGINT or SIGTERM. Raises InvalidInput, ValueError or OSError if it cannot start."""
    logs.configure("info")
    host, _ = split_listen(asked.http)
    if (asked.tls_cert is None) != (asked.tls_key is None):
        raise ValueError("TLS needs both --tls-cert and --tls-key")
    if not is_loopback(host) and (asked.tls_cert is None or asked.key_file is None):
        raise ValueError(
            f"{host} can be reached from other machines, so the server also needs --key-file, --tls-cert and "
            "--tls-key. Give these, or listen on 127.0.0.1."
        )
    asyncio.run(_serve(asked, key_in(asked.key_file)))


async def _serve(asked: GenerateServeOptions, key: str | None) -> None:
    settings = GenerationSettings(
        model=asked.model,
        name=asked.name,
        profile=asked.profile,
        policy=asked.policy,
        layout=asked.layout,
        number_type=asked.number_type,
        device=asked.device,
        threads=asked.threads,
        rows=asked.rows,
        kv_tokens=asked.kv_tokens,
        max_tokens=asked.max_tokens,
        max_waiting=asked.max_waiting,
    )
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    generation = await asyncio.to_thread(open_generation, settings)
    host, port = split_listen(asked.http)
    server = HttpServer(openai_app(generation, key), host, port, tls_cert=asked.tls_cert, tls_key=asked.tls_key)
    generation.live.start()
    try:
        port = await server.start()
        print(f"listening on {joined(host, port)}", flush=True)
        await stop.wait()
    finally:
        await server.stop()
        await asyncio.to_thread(generation.live.stop)
        generation.close()
