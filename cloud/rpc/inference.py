"""InferenceService on the wire: one student per stream, one answer per frame."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from isthmus.cloud.inference import HeadCache, Session, refusal
from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.rpc.scopes import caller
from isthmus.cloud.store import releases
from isthmus.cloud.store.database import Database
from isthmus.cloud.tenants.roster import Roster
from isthmus.proto.checks import identifier
from isthmus.proto.convert import infer_reply_to_pb
from isthmus.proto.errors import Busy, InvalidInput, IsthmusError, TooLate
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc

_OUTCOMES: Final = {0: "answered", TooLate.code: "dropped"}


@dataclass(frozen=True)
class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Maps InferenceService to sessions on cached heads."""

    cache: HeadCache
    database: Database
    metrics: Metrics
    roster: Roster

    async def Infer(self, requests: AsyncIterator[pb.InferRequest], context: Any) -> AsyncIterator[pb.InferResponse]:
        named = dict(context.invocation_metadata() or ()).get("isthmus-student")
        if not isinstance(named, str):
            raise InvalidInput("no student is named; set the metadata 'isthmus-student'")
        served = await self.cache.heads(caller().device_id, identifier("isthmus-student", named))
        if served.release != caller().release:
            # No reason to refuse a call that only reads: it is recorded at the next stream.
            with suppress(IsthmusError):
                await asyncio.to_thread(releases.uses, self.database, caller().device_id, served.release)
        # Of this call alone: an overflow, infinity or NaN is found in the answer, and refused.
        np.seterr(over="ignore", invalid="ignore")
        session, tenant = Session(served.heads, served.feature_width), caller().tenant
        async for request in requests:
            # A head is one small matrix product: cheaper to compute here than in another thread.
            try:
                self.roster.admit(tenant)
            except Busy as error:
                reply = refusal(request.sequence, error, time.perf_counter())
            else:
                reply = session.reply(request.sequence, request.frame, context.time_remaining())
            try:
                yield infer_reply_to_pb(reply)
            finally:
                # After the answer has left, and also if nobody waits for it any more.
                self.metrics.frame_seconds.observe(reply.server_ms / 1e3)
                self.metrics.frames[_OUTCOMES.get(reply.error_code, "refused")].inc()
