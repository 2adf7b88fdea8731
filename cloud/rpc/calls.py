"""Every call, of all services: its first message is awaited for a bounded time, decoded here, and surrounded by scopes.

gRPC would hold a call without a message for ever, and count it like any other. Here a call is a stream of raw bytes
until its caller is known:

    caller                            order                                            first message within
    a device, or a holder of the key  identity, count, first message, handler          20 s; a stream: no limit
    unknown (enrolment, health)       a place among unknown callers, first message,    5 s
                                      count, handler
    elastic serving without a key     first message, count, handler                    20 s; a stream: 60 s

Only what has passed "count" takes part in the bounds on calls. Calls without an identity or a message never use up the
room of those that have both. A known device beyond its tenant's quota is refused before all of that (``door.py``).
"""

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from isthmus.cloud.rpc.door import Door
from isthmus.cloud.rpc.interrupt import OpenCalls, Patience, Places
from isthmus.cloud.rpc.scopes import ASKING, ELASTIC, OPEN, OURS, Scope, is_known, status_scope
from isthmus.proto.errors import InvalidInput, IsthmusError, TooLate, Unauthenticated

UNKNOWN_S: Final = 5.0
KNOWN_S: Final = 20.0
STREAM_S: Final = 60.0
_ARRIVING: Final = 64
"""Calls of unknown callers whose first message is being received. Each may hold one message in memory."""
_AHEAD_BYTES: Final = 32 << 10
"""Bytes of a stream that are read before they are asked for. The read stops at the message that reaches them."""
_MESSAGE_BYTES: Final = 64
"""Bytes that count for each message beside its own, so that many empty messages are bounded too."""
_STAYING: Final = 64
"""Health watches and reflection streams that stay open."""

_reads: set[asyncio.Future[Any]] = set()
"""Reads in progress. A read cannot be cancelled while gRPC writes to its buffer, so it is left to end by itself."""


@dataclass(frozen=True)
class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds each call of our services with ``scopes`` and then ``count``; bounds calls of unknown callers."""

    scopes: Sequence[Scope]
    count: Scope
    door: Door
    calls: OpenCalls
    spend: Callable[[int], None] = lambda count: None
    """Called with the length of each message of a known caller; it raises if that is too much."""
    _arriving: Places = field(default_factory=lambda: Places(_ARRIVING))
    _staying: Places = field(default_factory=lambda: Places(_STAYING))
    _patience: Patience = field(default_factory=Patience)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:  # the door counts by method, so it must not see names that a caller made up
            return None
        ours = details.method.startswith(OURS)
        if ours and details.method not in OPEN and not details.method.startswith(ELASTIC):
            refusing = self.door.refusing(details.method, dict(details.invocation_metadata or ()))
            if refusing is not None:
                return refusing
        enter = self._ours if ours else self._others
        asking = self.calls if details.method in ASKING else None
        return _as_stream(handler, details.method, enter, self.spend if ours else lambda count: None, asking)

    async def _ours(self, stack: AsyncExitStack, method: str, streams: bool, raw: Any, context: Any) -> bytes | None:
        try:
            for scope in self.scopes:
                await stack.enter_async_context(scope(method, context))
        except Unauthenticated:
            if self._patience.is_over(context.peer()):
                await self._arriving.park()
            raise
        if is_known():
            await stack.enter_async_context(self.count(method, context))
            return await first_message(raw, None if streams else KNOWN_S)
        if method in OPEN:
            async with self._arriving.place(context.peer()):
                message = await first_message(raw, UNKNOWN_S)
        else:
            assert method.startswith(ELASTIC), "any other call has an identity"
            message = await first_message(raw, STREAM_S if streams else KNOWN_S)
        await stack.enter_async_context(self.count(method, context))
        return message

    async def _others(self, stack: AsyncExitStack, method: str, streams: bool, raw: Any, context: Any) -> bytes | None:
        await stack.enter_async_context(status_scope(method, context))
        async with self._arriving.place(context.peer()):
            message = await first_message(raw, UNKNOWN_S)
        # A single health check is never refused: it has arrived, and is answered at once.
        if streams or method.endswith("/Watch"):
            await stack.enter_async_context(self._staying.place(context.peer()))
        return message


_Enter = Callable[[AsyncExitStack, str, bool, Any, Any], Awaitable[bytes | None]]


async def first_message(raw: AsyncIterator[bytes], within_s: float | None) -> bytes | None:
    """Return the first message of a call, or None if the caller sends none. Raises TooLate."""
    read = asyncio.ensure_future(_next(raw))
    _reads.add(read)
    read.add_done_callback(_ended)
    done, _ = await asyncio.wait({read}, timeout=within_s)
    if not done:
        raise TooLate(f"no message arrived within {within_s:g} s")
    return read.result()


async def _next(raw: AsyncIterator[bytes]) -> bytes | None:
    return await anext(raw, None)


def _ended(read: asyncio.Future[Any]) -> None:
    _reads.discard(read)
    if not read.cancelled():
        read.exception()  # a read that nobody awaits any more fails when its call ends


def _as_stream(handler: Any, method: str, enter: _Enter, spend: Callable[[int], None], asking: OpenCalls | None) -> Any:
    """Return a handler that takes raw messages, whichever of the four kinds ``handler`` is.

    ``asking``: if the handler reads requests from a stream (``ASKING``), the calls that say when to read no more.
    """
    streams = bool(handler.request_streaming)
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    deserialize = _decoder(handler.request_deserializer)

    def decode(message: bytes) -> Any:
        if is_known():
            spend(len(message))
        return deserialize(message)

    async def begin(stack: AsyncExitStack, raw: Any, context: Any) -> Any:
        message = await enter(stack, method, streams, raw, context)
        if streams:
            return await stack.enter_async_context(aclosing(_messages(message, raw, decode, asking)))
        if message is None:
            raise InvalidInput("the call has no message")
        return decode(message)

    async def single(raw: Any, context: Any) -> Any:
        async with AsyncExitStack() as stack:
            return await inner(await begin(stack, raw, context), context)

    async def stream(raw: Any, context: Any) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            responses = inner(await begin(stack, raw, context), context)
            if inspect.isawaitable(responses):  # the handler writes by itself
                await responses
                return
            await stack.enter_async_context(aclosing(responses))
            async for response in responses:
                yield response

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
    return grpc.stream_unary_rpc_method_handler(single, None, handler.response_serializer)


async def _messages(
    first: bytes | None, raw: Any, decode: Callable[[bytes], Any], asking: OpenCalls | None
) -> AsyncIterator[Any]:
    if first is None:
        return
    ahead = Ahead(raw)
    with nullcontext() if asking is None else asking.telling(ahead.stop):
        try:
            yield decode(first)
            while (message := await ahead.message()) is not None:
                yield decode(message)
        finally:
            ahead.close()


class Ahead:
    """Reads messages of a stream before they are asked for: at most ``_AHEAD_BYTES`` and one message.

    A read and a write each take a turn through gRPC's own thread. Read ahead, a message is there when the answer to the
    one before has been written, and both turns pass at once.
    """

    def __init__(self, raw: AsyncIterator[bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._closed = False
        self._stopped: IsthmusError | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._taken: asyncio.Future[None] | None = None
        self._reading = asyncio.ensure_future(self._read(raw))
        _reads.add(self._reading)
        self._reading.add_done_callback(_ended)

    async def message(self) -> bytes | None:
        """Wait for the next message; None at the stream's end. Raises what reading raised, or the error of ``stop``."""
        while not self._messages:
            if self._stopped is not None:
                raise self._stopped
            if self._reading.done():
                self._reading.result()
                return None
            self._arrived = self._loop.create_future()
            await self._arrived
        message = self._messages.popleft()
        self._bytes -= len(message) + _MESSAGE_BYTES
        _wake(self._taken)
        return message

    def stop(self, error: IsthmusError) -> None:
        """Read no more, and raise ``error`` from ``message`` once what was read is taken.

        Nothing changes for a stream that has come to its end.
        """
        if self._reading.done():
            return
        self._stopped = error
        self.close()
        _wake(self._arrived)

    def close(self) -> None:
        """Read no more. A read in progress ends by itself, with its call."""
        self._closed = True
        _wake(self._taken)

    async def _read(self, raw: AsyncIterator[bytes]) -> None:
        try:
            async for message in raw:
                self._messages.append(message)
                self._bytes += len(message) + _MESSAGE_BYTES
                _wake(self._arrived)
                while self._bytes >= _AHEAD_BYTES and not self._closed:
                    self._taken = self._loop.create_future()
                    await self._taken
                if self._closed:
                    return
        finally:
            # The waiting caller runs after this task has ended, so it sees the result.
            self._loop.call_soon(_wake, self._arrived)


def _wake(waiting: "asyncio.Future[None] | None") -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


def _decoder(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(message: bytes) -> Any:
        try:
            return deserialize(message)
        except Exception as error:
            raise InvalidInput("the message cannot be decoded; it is not what this call takes") from error

    return decode
