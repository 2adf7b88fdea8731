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

from isthmus.cloud import identity, logs
from isthmus.cloud.metrics.calls import Metrics, kind_of
from isthmus.cloud.rpc.door import Door, bearer
from isthmus.cloud.rpc.interrupt import OpenCalls
from isthmus.cloud.rpc.statuses import STATUS, end_with
from isthmus.cloud.rpc.transport import identity_of
from isthmus.cloud.rpc.work import Work, busy
from isthmus.cloud.store.database import Database, Unusable, as_ours, disk_is_full
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.tenants import DEFAULT
from isthmus.cloud.tenants.roster import Roster
from isthmus.cloud.tracing import Traces
from isthmus.proto import trace
from isthmus.proto.errors import Busy, Internal, IsthmusError, StorageFull, Unauthenticated

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
ENDLESS: Final = frozenset({"/isthmus.v1.InferenceService/Infer", "/isthmus.v1.PersonalisationService/WatchJob"})
"""Streams that stay open until their device leaves. A server that stops ends them at once."""
ASKING: Final = frozenset({f"{_OPEN_INFERENCE}ModelStreamInfer"})
"""Streams of requests, each with an answer. A server that stops reads no more of them, answers what it has read, and
then ends them."""
_CALLER: ContextVar[Device] = ContextVar("caller")
_UNKNOWN: Final = "unknown callers"
_ELASTIC_CLIENTS: Final = "clients of elastic serving"
_MOST_UNKNOWN: Final = 64
"""Calls of unknown callers that are worked on at a time."""
_KNOWN: ContextVar[bool] = ContextVar("known", default=False)


def tenant() -> str:
    """Return the tenant of the current caller: its device's or its key's, and "default" without either."""
    return logs.TENANT.get() or DEFAULT


def caller() -> Device:
    """Return the device that made the current call."""
    return _CALLER.get()


def is_known() -> bool:
    """Return whether the current caller has proved who it is: a device, or a holder of the key of elastic serving."""
    return _KNOWN.get()


def identity_scope(database: Database, work: Work, roster: Roster, door: Door, elastic_key: str | None = None) -> Scope:
    """Make the scope that finds the caller: a device by its token or certificate, or a tenant by its key.

    Elastic serving has no devices. Its clients send a key of their tenant or, for the tenant "default",
    ``elastic_key``; if there is no key at all, everyone is served as "default". ``door`` has refused known devices
    beyond their quota before. The scope raises Unauthenticated, and Busy.
    """

    async def device(token: str, context: Any) -> Device:
        work.admit(context.time_remaining())
        try:
            found = await work.do(identity.authenticate, database, token, time.time(), identity_of(context))
        except Unauthenticated:
            door.forget(token)
            raise
        door.learn(token, found.tenant)
        return found

    @asynccontextmanager
    async def scope(method: str, context: Any) -> AsyncIterator[None]:
        if method in OPEN:
            yield
            return
        token = bearer(dict(context.invocation_metadata() or ()))
        if method.startswith(ELASTIC):
            asking = identity.asking(roster, elastic_key, token)
            roster.admit(asking.tenant)
            if not asking.known:
                yield
                return
            logs.TENANT.set(asking.tenant)
        else:
            if not token and identity_of(context) is None:
                raise Unauthenticated("no token: enrol first, then send 'authorization: Bearer <token>'")
            # Never reset: each call has a context of its own, and an abandoned stream is closed in another context.
            _CALLER.set(await device(token, context))
            logs.TENANT.set(caller().tenant)
        _KNOWN.set(True)
        yield

    return scope


def trace_scope(traces: Traces) -> Scope:
    """Make the scope that puts a call into its caller's trace. A stream is recorded as it opens, and stays not open."""

    @asynccontextmanager
    async def scope(method: str, context: Any) -> AsyncIterator[None]:
        header = dict(context.invocation_metadata() or ()).get(trace.KEY)
        parent = trace.TraceContext.read(header) or trace.TraceContext.new()
        name = method.removeprefix("/")
        if kind_of(method) == "unary":
            with traces.span(name, parent):
                yield
        else:
            traces.enter(name, parent)
            yield

    return scope


def spending(roster: Roster) -> Callable[[int], None]:
    """Return what counts the bytes of the current caller. It raises Busy beyond its tenant's quota."""
    return lambda count: roster.spend(tenant(), count)


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
        async with calls.open(who, endless=method in ENDLESS):
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
        await end_with(context, for_caller(error, method))


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
    status = code if isinstance(code, grpc.StatusCode) else STATUS.get(code, grpc.StatusCode.UNKNOWN)
    return str(status.name)
