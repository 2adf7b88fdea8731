"""Every call, of all services: its first message is awaited for a bounded time, decoded here, and surrounded by scopes.

gRPC would hold a call without a message for ever, and count it like any other. Here a call is a stream of raw bytes
until its caller is known:

    caller                            order                                            first message within
    a device, or a holder of the key  identity, count, first message, handler          20 s; a stream: no limit
    unknown (enrolment, health)       a place among unknown callers, first message,    5 s
                                      count, handler
    elastic serving without a key     first message, count, handler                    20 s; a stream: 60 s

Only what has passed "count" takes part in the bounds on calls. Calls without an identity or a message never use up the
room of those that have both.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AsyncExitStack, aclosing
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from isthmus.cloud.rpc.interrupt import Patience, Places
from isthmus.cloud.rpc.scopes import ELASTIC, OPEN, OURS, Scope, is_known, status_scope
from isthmus.proto.errors import InvalidInput, TooLate, Unauthenticated

UNKNOWN_S: Final = 5.0
KNOWN_S: Final = 20.0
STREAM_S: Final = 60.0
_ARRIVING: Final = 64
"""Calls of unknown callers whose first message is being received. Each may hold one message in memory."""
_STAYING: Final = 64
"""Health watches and reflection streams that stay open."""

_reads: set[asyncio.Future[Any]] = set()
"""Reads that nobody awaits. One cannot be cancelled while gRPC writes to its buffer, so it is left to end by itself."""


@dataclass(frozen=True)
class CallInterceptor(grpc.aio.ServerInterceptor):
    """Surrounds each call of our services with ``scopes`` and then ``count``; bounds calls of unknown callers."""

    scopes: Sequence[Scope]
    count: Scope
    spend: Callable[[int], None] = lambda count: None
    """Called with the length of each message of a known caller; it raises if that is too much."""
    _arriving: Places = field(default_factory=lambda: Places(_ARRIVING))
    _staying: Places = field(default_factory=lambda: Places(_STAYING))
    _patience: Patience = field(default_factory=Patience)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        ours = details.method.startswith(OURS)
        enter = self._ours if ours else self._others
        return _as_stream(handler, details.method, enter, self.spend if ours else lambda count: None)

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
    read = Begun(_next(raw))
    try:
        async with asyncio.timeout(within_s) as limit:
            return await read
    except BaseException as error:
        _leave(read)
        if isinstance(error, TimeoutError) and limit.expired():
            raise TooLate(f"no message arrived within {within_s:g} s") from None
        raise


async def _next(raw: AsyncIterator[bytes]) -> bytes | None:
    return await anext(raw, None)


def _ended(read: asyncio.Future[Any]) -> None:
    _reads.discard(read)
    if not read.cancelled():
        read.exception()  # a read that nobody awaits any more fails when its call ends


def _as_stream(handler: Any, method: str, enter: _Enter, spend: Callable[[int], None]) -> Any:
    """Return a handler that takes raw messages, whichever of the four kinds ``handler`` is."""
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
            return await stack.enter_async_context(aclosing(_messages(message, raw, decode)))
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


async def _messages(first: bytes | None, raw: Any, decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    if first is None:
        return
    ahead = Ahead(raw)
    try:
        yield decode(first)
        while (message := await ahead.message()) is not None:
            yield decode(message)
    finally:
        ahead.close()


class Ahead:
    """Reads a stream's messages one ahead of whoever takes them.

    A read and a write each take a turn through gRPC's own thread. Read ahead, a message is there when the answer to the
    one before has been written, and both turns pass at once. The taker waits for gRPC's own future and for no task in
    between, so a message that has arrived is worked on in the event loop's very next step.
    """

    def __init__(self, raw: AsyncIterator[bytes]) -> None:
        self._raw = raw
        self._read: Begun | None = Begun(_next(raw))

    async def message(self) -> bytes | None:
        """Wait for the next message; None at the stream's end. Raises what reading raised."""
        if self._read is None:
            return None
        read, self._read = self._read, None
        try:
            message = await read
        except BaseException:
            self._read = read  # a taker that was cancelled leaves the read to the next one; an error stays one
            raise
        if message is not None:
            self._read = Begun(_next(self._raw))
        return message

    def close(self) -> None:
        """Read no more. A read in progress ends by itself, with its call."""
        read, self._read = self._read, None
        if read is not None:
            _leave(read)


class Begun:
    """A coroutine that has run up to its first wait, and goes on in the task that awaits this. Awaited to its end once.

    A task that is cancelled meanwhile leaves off waiting. What the coroutine waits for is not cancelled with it.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, bytes | None]) -> None:
        self._coroutine = coroutine
        self._future: Any = None
        self._ended = False
        self._result: bytes | None = None
        self._error: BaseException | None = None
        self._go_on()

    def __await__(self) -> Generator[Any, None, bytes | None]:
        while not self._ended:
            if self._future is None:
                yield None  # one turn of the event loop
            elif not self._future.done():
                try:
                    yield _Uncancelled(self._future)
                except Exception:
                    if not self._future.done():
                        raise
                    # The future's own error, which is the coroutine's to handle: gRPC makes the stream's end of it.
            self._go_on()
        if self._error is not None:
            raise self._error
        return self._result

    def _go_on(self) -> None:
        try:
            self._future = self._coroutine.send(None)
            if self._future is not None:
                self._future._asyncio_future_blocking = False  # as a task does that takes it
        except StopIteration as end:
            self._ended, self._result = True, end.value
        except Exception as error:
            self._ended, self._error = True, error


class _Uncancelled:
    """A future as a task waits for it (``asyncio.isfuture``), whose cancellation ends the wait and not the future."""

    def __init__(self, future: "asyncio.Future[Any]") -> None:
        self._asyncio_future_blocking = True
        self._future = future
        self._wake: Callable[[Any], None] | None = None
        self._context: Context | None = None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._future.get_loop()

    def add_done_callback(self, wake: Callable[[Any], None], *, context: Context | None = None) -> None:
        self._wake, self._context = wake, context
        self._future.add_done_callback(wake, context=context)

    def cancel(self, msg: Any = None) -> bool:
        if self._wake is None or not self._future.remove_done_callback(self._wake):
            return False  # it is done: the task learns of the cancellation when it runs
        cancelled: asyncio.Future[None] = self._future.get_loop().create_future()
        cancelled.cancel(msg)
        cancelled.add_done_callback(self._wake, context=self._context)
        return True


def _leave(read: Begun) -> None:
    """Let a read end by itself, for nobody."""

    async def end() -> None:
        await read

    left = asyncio.ensure_future(end())
    _reads.add(left)
    left.add_done_callback(_ended)


def _decoder(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(message: bytes) -> Any:
        try:
            return deserialize(message)
        except Exception as error:
            raise InvalidInput("the message cannot be decoded; it is not what this call takes") from error

    return decode
