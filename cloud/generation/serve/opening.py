"""Opens what answers requests for text: a model of ours or other servers, with answers that are kept in front.

Replicas that this server runs itself are opened by ``cloud/replicas/opening.py``.

The libraries that a model needs are imported only if one is opened.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.cloud.generation.scheduling.blocks import BLOCK_TOKENS
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.serve.serving import Answering, Generation
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.command_line import key_in
from isthmus.data.files import read_text

if TYPE_CHECKING:  # torch and aiohttp are imported by these
    from isthmus.cloud.generation.serve.moving import Moves
    from isthmus.cloud.generation.serve.relay import Relay

log = logging.getLogger(__name__)

MAX_RULES_BYTES = 1 << 20
MAX_DRAINED_BYTES = 1 << 16


@dataclass(frozen=True)
class Opened:
    """What answers, and how the list of drained servers is read again (nothing happens without such a list).

    ``moves`` and ``move_key`` are there if a front may move requests from and to a model of ours.
    """

    answering: Answering
    read_drained: Callable[[], None] = lambda: None
    moves: "Moves | None" = None
    move_key: str | None = None


@asynccontextmanager
async def opened(settings: GenerationSettings) -> AsyncIterator[Opened]:
    """Opens what ``settings`` names, and closes it at the end. The event loop is not held up meanwhile.

    Raises InvalidInput, ValueError or OSError, with the way out, if it cannot be opened.
    """
    if settings.model is not None:
        move_key = key_in(settings.move_key_file)
        async with _model(settings) as generation, kept_answers(settings, generation) as front:
            yield Opened(front, moves=generation.moves, move_key=move_key)
        return
    async with _relay(settings) as found, kept_answers(settings, found.answering) as front:
        yield Opened(front, found.read_drained)


@asynccontextmanager
async def _model(settings: GenerationSettings) -> AsyncIterator[Generation]:
    from isthmus.cloud.generation.serve.host import open_generation

    generation = await asyncio.to_thread(open_generation, settings)
    try:
        generation.live.start()
        yield generation
    finally:
        await asyncio.to_thread(generation.live.stop)
        generation.close()


@asynccontextmanager
async def _relay(settings: GenerationSettings) -> AsyncIterator[Opened]:
    from isthmus.cloud.generation.policies.by_name import make_order
    from isthmus.cloud.generation.serve.relay import Relay
    from isthmus.cloud.generation.serve.upstream import Upstream

    key, move_key = (key_in(each) for each in (settings.upstream_key_file, settings.upstream_move_key_file))
    relay = Relay(
        settings.name or settings.upstream_model or "upstream",
        [Upstream(url, key=key, model=settings.upstream_model, move_key=move_key) for url in settings.upstream or []],
        Limits(rows=settings.rows, blocks=max(1, settings.kv_tokens // BLOCK_TOKENS)),
        make_order(settings.policy),
        context=settings.kv_tokens,
        max_tokens=settings.max_tokens,
        max_waiting=settings.max_waiting,
    )
    async with relaying(relay, settings.drained) as found:
        yield found


@asynccontextmanager
async def relaying(relay: "Relay", drained: Path | None) -> AsyncIterator[Opened]:
    """Starts and stops a relay. ``drained`` names the replicas that get no new requests.

    Raises ValueError if it names one that there is not.
    """

    def drain() -> None:
        lines = [] if drained is None else read_text(drained, limit_bytes=MAX_DRAINED_BYTES).split()
        lines = [line.rstrip("/").removesuffix("/v1") for line in lines]
        for line in lines:
            if line not in relay.urls:
                raise ValueError(
                    f"{drained} names {line[:128]!r}, which is none of the upstream servers or replicas: "
                    f"{', '.join(relay.urls)[:512]}"
                )
        for url in relay.urls:
            relay.drain(url, draining=url in lines)

    def drain_again() -> None:
        try:
            drain()
        except (OSError, ValueError) as error:
            log.warning("no other replica is drained: %s", error)

    drain()
    try:
        await relay.start()
        yield Opened(relay, drain_again)
    finally:
        await relay.stop()


@asynccontextmanager
async def kept_answers(settings: GenerationSettings, behind: Answering) -> AsyncIterator[Answering]:
    """Keeps answers of the classes that the cache's rules name, in front of what answers."""
    if settings.cache is None:
        yield behind
        return
    from isthmus.cloud.generation.model.embedder import Embedder
    from isthmus.cloud.generation.scheduling.cache import AnswerCache, CacheRule
    from isthmus.cloud.generation.serve.cached import CachedAnswers

    rules = CacheRule.read(json.loads(read_text(settings.cache, limit_bytes=MAX_RULES_BYTES)))
    folder, most = settings.cache_embedder, settings.max_waiting
    embedder = None if folder is None else await asyncio.to_thread(Embedder.read, folder)
    cached = CachedAnswers(behind, AnswerCache(rules), embedder, pressure=lambda: behind.numbers().under_way / most)
    try:
        yield cached
    finally:
        cached.close()
