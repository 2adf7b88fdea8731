"""Opens what answers requests for text, replicas of the model included that this server runs itself.

The libraries of the executor that is not asked for are not imported.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from isthmus.cloud.cluster.connection import is_ray
from isthmus.cloud.generation.model.configuration import LlamaConfig
from isthmus.cloud.generation.model.tokenizer import TextTokenizer, TokenizerThread
from isthmus.cloud.generation.policies.by_name import ORDERS, make_order
from isthmus.cloud.generation.policies.orders import Order
from isthmus.cloud.generation.scheduling.blocks import BLOCK_TOKENS
from isthmus.cloud.generation.scheduling.policy import Limits
from isthmus.cloud.generation.serve.opening import Opened, kept_answers, relaying
from isthmus.cloud.generation.serve.opening import opened as opened_here
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.replicas.hosted import Hosted, Opening, Running
from isthmus.proto.errors import InvalidInput


@asynccontextmanager
async def opened(settings: GenerationSettings) -> AsyncIterator[Opened]:
    """Opens what ``settings`` names, and closes it at the end. The event loop is not held up meanwhile.

    Raises InvalidInput, ValueError or OSError, with the way out, if it cannot be opened.
    """
    if not settings.hosted:
        async with opened_here(settings) as found:
            yield found
        return
    async with _replicas(settings) as found, kept_answers(settings, found.answering) as front:
        yield Opened(front, found.read_drained)


@asynccontextmanager
async def _replicas(settings: GenerationSettings) -> AsyncIterator[Opened]:
    # They import aiohttp.
    from isthmus.cloud.generation.serve.relay import Relay
    from isthmus.cloud.generation.serve.upstream import Upstream

    folder = settings.model
    if folder is None:
        raise ValueError("a model directory is needed")
    key = secrets.token_hex(32)
    opening = Opening.of(settings, key)
    start = partial(Alike(_start(settings)).start, opening)
    hosts = [Hosted(f"replica-{at}", start) for at in range(1, settings.replicas + 1)]
    config = await asyncio.to_thread(LlamaConfig.read, folder)
    counts = TokenizerThread(await asyncio.to_thread(TextTokenizer.read, folder, config))
    async with AsyncExitStack() as stack:
        stack.callback(counts.close)
        for host in hosts:
            stack.push_async_callback(host.close)
        if settings.profile is None:
            for host in hosts:  # each measures its machine, which may be the same
                await host.open()
        else:
            # All of them end before the first error is raised, so none is started that nobody ends.
            for found_error in await asyncio.gather(*(host.open() for host in hosts), return_exceptions=True):
                if found_error is not None:
                    raise found_error
        upstreams = [Upstream(f"replica-{at}", key=key, move_key=key, carrier=host) for at, host in enumerate(hosts, 1)]
        order, limits = _in_front(settings)
        relay = Relay(
            settings.name or folder.resolve().name,
            upstreams,
            limits,
            order,
            context=config.context,
            max_tokens=settings.max_tokens,
            max_waiting=settings.max_waiting,
            counts=counts,
        )
        async with relaying(relay, settings.drained) as found:
            yield found


def _in_front(settings: GenerationSettings) -> tuple[Order, Limits]:
    """Returns in which order requests leave the front, and how many a replica is given at a time.

    A policy that is an order alone holds over all replicas, so requests wait in front of them. The other policies
    choose the rows of a step among those who wait, so requests go to the freest replica at once.
    """
    if settings.policy in ORDERS:
        return make_order(settings.policy), Limits(settings.rows, max(1, settings.kv_tokens // BLOCK_TOKENS))
    return make_order("fused"), Limits(settings.max_waiting, settings.max_waiting * settings.kv_tokens // BLOCK_TOKENS)


def _start(settings: GenerationSettings) -> Callable[[Opening], Awaitable[Running]]:
    """Returns what starts one replica."""
    if is_ray(settings.executor):
        from isthmus.cloud.replicas.on_ray import start as on_ray

        return partial(on_ray, settings.executor)
    from isthmus.cloud.replicas.process import start

    return start


class Alike:
    """Starts replicas of one model, each of which may be on another machine than the last time."""

    def __init__(self, start: Callable[[Opening], Awaitable[Running]]) -> None:
        self._start = start
        self._model: str | None = None

    async def start(self, opening: Opening) -> Running:
        """Starts a replica. Raises what starting raises, and InvalidInput for other weights than the first one's.

        A request may go on at another replica, so its client would get text of two models.
        """
        from isthmus.cloud.generation.serve.upstream import Upstream  # it imports aiohttp

        running = await self._start(opening)
        try:
            asked = Upstream("a replica", move_key=opening.key, carrier=running.carrier)
            model = str((await asked.costs()).get("model"))
            self._model = self._model or model
            if model != self._model:
                raise InvalidInput(
                    f"a replica has other weights than the first: copy {opening.settings.model} to all machines again"
                )
        except BaseException:
            await running.end()
            raise
        return running
