"""Moves a running request from one replica of ours to another, as the front does it: copy, stop, arrive, or stay.

Nothing is lost if either side fails: until the request has arrived, its old replica can go on; from then on the front
reads the new one, and closes the stream of the old one, which thereby forgets it. The new replica sends the whole text
again, and the front passes on what its client does not have.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from isthmus.cloud.generation.scheduling.replicas import MoveCosts
from isthmus.cloud.generation.serve.carrier import Lost
from isthmus.cloud.generation.serve.moved import unframed
from isthmus.cloud.generation.serve.upstream import Upstream
from isthmus.proto.errors import InvalidInput, IsthmusError

ARRIVES_S: Final = 10.0
"""A request that has not arrived by then stays where it was."""
FIRST_BYTES_PER_S: Final = 3e8
"""Bytes per second between two replicas that are planned with before any were moved."""
_KEPT: Final = 0.7
"""Weight of what was measured before, when another move is measured."""

Events = AsyncGenerator[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Arrived:
    """A request that goes on at its new replica: its first event and the others, and how long it was at none."""

    first: tuple[str, Mapping[str, Any]]
    events: Events
    by_blocks: bool
    pause_s: float

    async def from_the_first(self) -> Events:
        """Yields all its events, the first of which was awaited already."""
        async with aclosing(self.events):
            yield self.first
            async for each in self.events:
                yield each


@dataclass
class Mover:
    """Moves requests, and measures how fast keys and values get from one replica to another."""

    clock: Callable[[], float] = time.monotonic
    bytes_per_s: float = FIRST_BYTES_PER_S
    _costs: dict[str, tuple[str, MoveCosts, bool]] = field(default_factory=dict)

    async def move(self, source: Upstream, target: Upstream, name: str, tokens: int, form: str) -> Arrived:
        """Moves the request ``name``, of about so many tokens. Its keys and values go with it if that is faster.

        Raises Lost or InvalidInput if it did not arrive; then it goes on at ``source``, if that is alive.
        """
        (model, _, gives), (same, costs, takes) = await self._of(source), await self._of(target)
        if model != same:
            raise InvalidInput(f"{source.url} and {target.url} serve different models or number types")
        handle, first = secrets.token_hex(16), None
        if gives and takes and costs.by_blocks(tokens, self.bytes_per_s):
            first = await self._copy(source, target, name, handle)
        began_s = self.clock()
        body = await source.leave(name, first)
        events = target.arrive(handle, body, form)
        try:
            by_blocks = bool(unframed(body)[0].get("computed"))
            event = await asyncio.wait_for(anext(events), ARRIVES_S)
        except (IsthmusError, TimeoutError, StopAsyncIteration) as error:
            await events.aclose()
            with suppress(IsthmusError):
                await source.stay(name)
            raise Lost(f"{target.url}: a request did not arrive") from error
        return Arrived(event, events, by_blocks, self.clock() - began_s)

    async def _copy(self, source: Upstream, target: Upstream, name: str, handle: str) -> int | None:
        """Copies what is computed by now while the request goes on, and returns how many tokens that are, if any."""
        began_s = self.clock()
        part = await source.part(name)
        tokens = unframed(part)[0].get("tokens")
        if not isinstance(tokens, int):
            raise Lost(f"{source.url} sent no part of a request")
        if not tokens:
            return None
        await target.keep_part(handle, part)
        measured = len(part) / max(1e-6, self.clock() - began_s)
        self.bytes_per_s = _KEPT * self.bytes_per_s + (1 - _KEPT) * measured
        return tokens

    async def _of(self, upstream: Upstream) -> tuple[str, MoveCosts, bool]:
        """Returns a replica's model, its costs, and whether its keys and values can be moved."""
        if upstream.url not in self._costs:
            raw = await upstream.costs()
            try:
                numbers = [float(raw[name]) for name in ("step_fixed_s", "prompt_s", "pair_s", "kv_bytes_per_token")]
                self._costs[upstream.url] = str(raw["model"]), MoveCosts(*numbers), bool(raw["takes_blocks"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise Lost(f"{upstream.url} does not say what a move costs") from error
        return self._costs[upstream.url]
