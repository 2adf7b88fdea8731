"""Scopes around each call of our services: identity, limits, translation of errors to statuses, metrics.

A scope is an async context manager. It is entered before the handler runs and left when the call ends, for all four
kinds of calls. Health and reflection have no scopes: they need no token.
"""

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

import grpc
from sqlalchemy.exc import DBAPIError

from isthmus.cloud import identity
from isthmus.cloud.rpc.metrics import Metrics
from isthmus.cloud.store.database import Database, as_ours, disk_is_full
from isthmus.cloud.store.devices import Device
from isthmus.proto.errors import NAME_KEY, Busy, Internal, IsthmusError, StorageFull, Unauthenticated

log = logging.getLogger(__name__)

Scope = Callable[[str, Any], AbstractAsyncContextManager[None]]

_OPEN_INFERENCE: Final = "/inference.GRPCInferenceService/"
_ELASTIC: Final = ("/isthmus.v1.ElasticService/", _OPEN_INFERENCE)
_OURS: Final = ("/isthmus.v1.", _OPEN_INFERENCE)
_OPEN: Final = frozenset(
    {
        "/isthmus.v1.PersonalisationService/Enrol",
        # Asked by monitoring. The answers reveal only that the server is there.
        f"{_OPEN_INFERENCE}ServerLive",
        f"{_OPEN_INFERENCE}ServerReady",
    }
)
_STATUS: Final = {status.value[0]: status for status in grpc.StatusCode}
_CALLER: ContextVar[Device] = ContextVar("caller")


def caller() -> Device:
    """Return the device that made the current call."""
    return _CALLER.get()


class ScopeInterceptor(grpc.aio.ServerInterceptor):
    """Puts a scope around each call of our services."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_OURS):
            return handler
        return _scoped(handler, partial(self._scope, details.method))


def _scoped(handler: Any, scope: Callable[[Any], AbstractAsyncContextManager[None]]) -> Any:
    codec = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    async def single(request: Any, context: Any) -> Any:
        async with scope(context):
            return await inner(request, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        async with scope(context), aclosing(inner(request, context)) as responses:
            async for response in responses:
                yield response

    if handler.stream_stream:
        return grpc.stream_stream_rpc_method_handler(stream, **codec)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(stream, **codec)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(single, **codec)
    return grpc.unary_unary_rpc_method_handler(single, **codec)


def identity_scope(database: Database, elastic_key: str | None = None) -> Scope:
    """Make the scope that finds the device by the call's token.

    Elastic serving has no devices; with ``elastic_key`` its clients must send that key. The scope raises
    Unauthenticated.
    """

    @asynccontextmanager
    async def scope(method: str, context: Any) -> AsyncIterator[None]:
        elastic = method.startswith(_ELASTIC)
        if method in _OPEN or (elastic and elastic_key is None):
            yield
            return
        metadata = dict(context.invocation_metadata() or ())
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        if scheme.lower() != "bearer" or not token:
            first = "ask the operator for the key" if elastic else "enrol first"
            raise Unauthenticated(f"no token: {first}, then send 'authorization: Bearer <token>'")
        if elastic_key is not None and elastic:
            if not identity.same_secret(token, elastic_key):
                raise Unauthenticated("the key is wrong; ask the operator for it")
            yield
            return
        # Never reset: each call has a context of its own, and an abandoned stream is closed in another context.
        _CALLER.set(await asyncio.to_thread(identity.authenticate, database, token))
        yield

    return scope


def limit_scope(calls_per_device: int) -> Scope:
    """Make the scope that bounds the calls in progress per device. It raises Busy. Elastic serving is exempt."""
    in_progress: Counter[str] = Counter()

    @asynccontextmanager
    async def scope(method: str, context: Any) -> AsyncIterator[None]:
        if method.startswith(_ELASTIC):
            yield
            return
        who = "" if method in _OPEN else caller().device_id
        if in_progress[who] >= calls_per_device:
            raise Busy(f"at most {calls_per_device} calls at a time; try again when one has ended")
        in_progress[who] += 1
        try:
            yield
        finally:
            in_progress[who] -= 1
            if not in_progress[who]:
                del in_progress[who]

    return scope


@asynccontextmanager
async def status_scope(method: str, context: Any) -> AsyncIterator[None]:
    """End a failed call with the status of its error."""
    try:
        yield
    except grpc.aio.BaseError:
        raise
    except Exception as error:
        ours = for_caller(error, method)
        await context.abort(_STATUS[ours.code], str(ours), ((NAME_KEY, type(ours).__name__),))


def for_caller(error: Exception, method: str) -> IsthmusError:
    """Return the error to send to a caller. An internal error becomes a reference; the log has the details under it."""
    ours = translated(error)
    if isinstance(ours, Internal):
        reference = secrets.token_hex(4)
        log.error("%s failed (reference %s)", method, reference, exc_info=error)
        return Internal(f"the server failed; tell its operator reference {reference}")
    return ours


def translated(error: Exception) -> IsthmusError:
    """Return the error of our tree for any exception; Internal if none fits better."""
    if isinstance(error, DBAPIError):
        known = as_ours(error)
        return known if isinstance(known, IsthmusError) else Internal(str(error))
    if isinstance(error, IsthmusError):
        return error
    if isinstance(error, OSError) and disk_is_full(error):
        return StorageFull("the server's disk is full; try again later")
    return Internal(str(error))


def metrics_scope(metrics: Metrics) -> Scope:
    """Make the scope that counts calls by method and status and measures their duration."""

    @asynccontextmanager
    async def scope(method: str, context: Any) -> AsyncIterator[None]:
        name = method.rpartition("/")[2]
        with metrics.seconds.labels(name).time(), metrics.in_progress.labels(name).track_inprogress():
            try:
                yield
            except asyncio.CancelledError:
                metrics.calls.labels(name, "CANCELLED").inc()
                raise
            except Exception:
                metrics.calls.labels(name, _code_name(context)).inc()
                raise
        metrics.calls.labels(name, "OK").inc()

    return scope


def _code_name(context: Any) -> str:
    code = context.code()
    status = code if isinstance(code, grpc.StatusCode) else _STATUS.get(code, grpc.StatusCode.UNKNOWN)
    return str(status.name)
