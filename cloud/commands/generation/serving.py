"""The work of ``isthmus generate serve``: serve one language model over HTTP until a signal stops it."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from isthmus.cloud import logs
from isthmus.cloud.commands.generation.options import GenerateServeOptions
from isthmus.cloud.generation.model.embedder import Embedder
from isthmus.cloud.generation.policies.by_name import make_order
from isthmus.cloud.generation.scheduling.blocks import BLOCK_TOKENS
from isthmus.cloud.generation.scheduling.cache import AnswerCache, CacheRule
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.serve.cached import CachedAnswers
from isthmus.cloud.generation.serve.relay import Relay
from isthmus.cloud.generation.serve.serving import Answering
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.generation.serve.upstream import Upstream
from isthmus.cloud.http.openai import openai_app
from isthmus.cloud.http.server import HttpServer
from isthmus.cloud.settings import is_loopback, joined, split_listen
from isthmus.command_line import key_in
from isthmus.data.files import read_text, write_atomically


def serve(asked: GenerateServeOptions) -> None:
    """Serve until SIGINT or SIGTERM. Raises InvalidInput, ValueError or OSError if it cannot start."""
    logs.configure("info")
    host, _ = split_listen(asked.http)
    if (asked.model is None) != bool(asked.generate_upstream):
        raise ValueError("give either MODEL_DIR or --generate-upstream URL")
    if asked.cache_embedder is not None and asked.cache is None:
        raise ValueError("--cache-embedder needs --cache")
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
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    host, port = split_listen(asked.http)
    async with (
        _own_model(asked) if asked.model is not None else _relay(asked) as behind,
        _cached(asked, behind) as answering,
    ):
        server = HttpServer(openai_app(answering, key), host, port, tls_cert=asked.tls_cert, tls_key=asked.tls_key)
        try:
            port = await server.start()
            if asked.port_file is not None:
                write_atomically(asked.port_file, joined(host, port) + "\n")
            print(f"listening on {joined(host, port)}", flush=True)
            await stop.wait()
        finally:
            await server.stop()


@asynccontextmanager
async def _cached(asked: GenerateServeOptions, behind: Answering) -> AsyncIterator[Answering]:
    """Keeps answers of the classes that ``--cache`` names, in front of what answers."""
    if asked.cache is None:
        yield behind
        return
    rules = CacheRule.read(json.loads(read_text(asked.cache, limit_bytes=1 << 20)))
    embedder = None if asked.cache_embedder is None else await asyncio.to_thread(Embedder.read, asked.cache_embedder)
    most = asked.max_waiting
    cached = CachedAnswers(behind, AnswerCache(rules), embedder, pressure=lambda: behind.under_way / most)
    try:
        yield cached
    finally:
        cached.close()


@asynccontextmanager
async def _own_model(asked: GenerateServeOptions) -> AsyncIterator[Answering]:
    from isthmus.cloud.generation.serve.host import open_generation

    assert asked.model is not None
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
        swap_tokens=asked.swap_tokens,
        swap_folder=asked.swap_folder,
        max_tokens=asked.max_tokens,
        max_waiting=asked.max_waiting,
    )
    generation = await asyncio.to_thread(open_generation, settings)
    generation.live.start()
    try:
        yield generation
    finally:
        await asyncio.to_thread(generation.live.stop)
        generation.close()


@asynccontextmanager
async def _relay(asked: GenerateServeOptions) -> AsyncIterator[Answering]:
    key = key_in(asked.upstream_key_file)
    urls = asked.generate_upstream or []
    relay = Relay(
        asked.name or asked.upstream_model or "upstream",
        [Upstream(url, key=key, model=asked.upstream_model) for url in urls],
        Limits(rows=asked.rows, blocks=max(1, asked.kv_tokens // BLOCK_TOKENS)),
        make_order(asked.policy),
        context=asked.kv_tokens,
        max_tokens=asked.max_tokens,
        max_waiting=asked.max_waiting,
    )

    def drain() -> None:
        lines = [] if asked.drained is None else read_text(asked.drained, limit_bytes=1 << 16).split()
        for line in lines:
            if line not in urls:
                raise ValueError(f"{asked.drained} names {line[:128]!r}, which is no --generate-upstream")
        for url in urls:
            relay.drain(url, draining=url in lines)

    def drain_again() -> None:
        try:
            drain()
        except (OSError, ValueError) as error:
            print(f"nothing is drained anew: {error}", flush=True)

    drain()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, drain_again)
    try:
        await relay.start()
        yield relay
    finally:
        await relay.stop()
