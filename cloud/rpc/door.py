"""Calls beyond their tenant's quota, refused before anything else is done for them: no scope, no message, no database.

A noisy tenant takes time from the others by every call that is refused, so a refusal has to be cheap.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

import grpc

from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.rpc.statuses import end_with, status_of
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.errors import Busy, Unauthenticated

_MOST_OWNERS: Final = 20_000
_ADMITTED: ContextVar[bool] = ContextVar("admitted", default=False)


class Door:
    """Knows the tenants of tokens that were good before, to refuse with, never to admit."""

    def __init__(self, roster: Roster, metrics: Metrics) -> None:
        self._roster = roster
        self._metrics = metrics
        self._owners: OrderedDict[bytes, str] = OrderedDict()

    def refusing(self, method: str, metadata: Mapping[str, str | bytes]) -> Any:
        """Count a call of a device that is known, and return a handler that refuses it; None if it may pass."""
        owner = self._owners.get(_digest(token)) if (token := bearer(metadata)) else None
        if owner is None or self._roster.is_closed(owner):
            return None
        try:
            self._roster.admit(owner)
        except Busy as error:
            return self._refusal(method, error)
        except Unauthenticated:  # closed at this moment
            return None
        _ADMITTED.set(True)
        return None

    def learn(self, token: str, tenant: str) -> None:
        """Count the call of a device that has just proved who it is, if ``refusing`` has not. Raises Busy."""
        if not _ADMITTED.get():
            self._roster.admit(tenant)
            self._owners[_digest(token)] = tenant
            if len(self._owners) > _MOST_OWNERS:
                self._owners.popitem(last=False)

    def forget(self, token: str) -> None:
        """Forget a token that is no longer good, so that it uses up no more of its former tenant's quota."""
        self._owners.pop(_digest(token), None)

    def _refusal(self, method: str, error: Busy) -> Any:
        of, code = self._metrics.of(method), status_of(error).name
        began_s = time.perf_counter()

        async def refuse(raw: Any, context: Any) -> None:
            of.started.inc()
            try:
                await end_with(context, error)
            finally:
                of.seconds.observe(time.perf_counter() - began_s)
                of.handled(code).inc()

        # To the caller a call without an answer is the same, however its method streams.
        return grpc.stream_unary_rpc_method_handler(refuse)


def bearer(metadata: Mapping[str, str | bytes]) -> str:
    """Return the token of a call, or ""."""
    scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
    return token if scheme.lower() == "bearer" else ""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
