"""Scopes around each call of our services: identity, limits, translation of errors to statuses, metrics.

A scope is an async context manager. It is entered before the handler runs and left when the call ends, for all four
kinds of calls (``calls.py`` enters them). Health and reflection need no token.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final

import grpc
from sqlalchemy.exc import DBAPIError

from isthmus.cloud import identity
from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.rpc.interrupt import OpenCalls
from isthmus.cloud.rpc.work import Work, busy
from isthmus.cloud.store.database import Database, Unusable, as_ours, disk_is_full
from isthmus.cloud.store.devices import Device
from isthmus.proto.errors import NAME_KEY, RETRY_KEY, Busy, Internal, IsthmusError, StorageFull, Unauthenticated

log = logging.getLogger(__name__)

Scope = Callable[[str, Any], AbstractAsyncContextManager[None]]

_OPEN_INFERENCE: Final = "/inference.GRPCInferenceService/"
ELASTIC: Final = ("/isthmus.v1.ElasticService/", _OPEN_INFERENCE)
OURS: Final = ("/isthmus.v1.", _OPEN_INFERENCE)
OPEN: Final = frozenset(
    {
        "/isthmus.v1.PersonalisationService/Enrol",
        # Asked by monitoring. The answers reveal only that the server is there.
        f"{_OPEN_INFERENCE}ServerLive",
        f"{_OPEN_INFERENCE}ServerReady",
    }
)
_STATUS: Final = {status.value[0]: status for status in grpc.StatusCode}
_CALLER: ContextVar[Device] = ContextVar("caller")
_UNKNOWN: Final = "unknown callers"
_ELASTIC_CLIENTS: Final = "clients of elastic serving"
_MOST_UNKNOWN: Final = 64
"""Calls of unknown callers that are worked on at a time."""
_KNOWN: ContextVar[bool] = ContextVar("known", default=False)


def caller() -> Device:
    """Return the device that made the current call."""
    return _CALLER.get()


def is_known() -> bool:
    """Return whether the current caller has proved who it is: a device, or a holder of the key of elastic serving."""
    return _KNOWN.get()


def identity_scope(database: Database, work: Work, elastic_key: str | None = None) -> Scope:
    """Make the scope that finds the device by the call's token.

    Elastic serving has no devices; with ``elastic_key`` its clients must send that key. The scope raises
    Unauthenticated, and Busy if the server has no time to look.
    """

    @asynccontextmanager
    async def scope(method: str, context: Any) -> AsyncIterator[None]:
        elastic = method.startswith(ELASTIC)
        if method in OPEN or (elastic and elastic_key is None):
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
        else:
            work.admit(context.time_remaining())
            # Never reset: each call has a context of its own, and an abandoned stream is closed in another context.
            _CALLER.set(await work.do(identity.authenticate, database, token, time.time()))
        _KNOWN.set(True)
        yield

    return scope


def count_scope(calls: OpenCalls, *, most: int, most_per_device: int) -> Scope:
    """Make the scope that bounds the calls in progress, in all and per device. It raises Busy."""

    @asynccontextmanager
    async def scope(method: str, context: Any) -> AsyncIterator[None]:
        if method in OPEN:
            who, full = _UNKNOWN, calls.of(_UNKNOWN) >= _MOST_UNKNOWN
        else:
            who = _ELASTIC_CLIENTS if method.startswith(ELASTIC) else caller().device_id
            # Calls of unknown callers have a bound of their own, so they never use up the room of the others.
            full = len(calls) - calls.of(_UNKNOWN) >= most
        if who not in (_UNKNOWN, _ELASTIC_CLIENTS) and calls.of(who) >= most_per_device:
            raise Busy(f"at most {most_per_device} calls at a time; try again when one has ended", retry_after_s=1.0)
        if full:
            raise busy(1.0)
        async with calls.open(who):
            yield

    return scope


def devices_calling(calls: OpenCalls) -> list[str]:
    """Return the ids of the devices with calls in progress."""
    return [who for who in calls.callers if who not in (_UNKNOWN, _ELASTIC_CLIENTS)]


@asynccontextmanager
async def status_scope(method: str, context: Any) -> AsyncIterator[None]:
    """End a failed call with the status of its error."""
    try:
        yield
    except grpc.aio.BaseError:
        raise
    except Exception as error:
        ours = for_caller(error, method)
        trailing = [(NAME_KEY, type(ours).__name__)]
        if isinstance(ours, Busy) and ours.retry_after_s is not None:
            trailing.append((RETRY_KEY, str(round(1e3 * ours.retry_after_s))))
        await context.abort(_STATUS[ours.code], str(ours), tuple(trailing))


def for_caller(error: Exception, method: str) -> IsthmusError:
    """Return the error to send to a caller. An internal error becomes a reference; the log has the details under it."""
    ours = translated(error)
    if isinstance(ours, Internal | Unusable):
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
        of, began_s, code = metrics.of(method), time.perf_counter(), "OK"
        of.started.inc()
        try:
            yield
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:
            code = _code_name(context)
            raise
        finally:
            of.seconds.observe(time.perf_counter() - began_s)
            of.handled(code).inc()

    return scope


def _code_name(context: Any) -> str:
    code = context.code()
    status = code if isinstance(code, grpc.StatusCode) else _STATUS.get(code, grpc.StatusCode.UNKNOWN)
    return str(status.name)
