"""Calls that a server had received when it stopped, and never began: gRPC ends them as CANCELLED."""

import asyncio

import grpc
import numpy as np

from isthmus.cloud.elastic.scheduling.profile import paper_profile
from isthmus.cloud.elastic.scheduling.query import Outcome, Query
from isthmus.cloud.load import replay
from isthmus.cloud.load.outcomes import figures
from isthmus.cloud.load.run import open_loop


def never_begun() -> grpc.aio.AioRpcError:
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, none, none, details="CANCELLED")


class Stopped:
    """A connection to a server that stops, and the channel of one."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def call(self, timeout_s: float) -> None:
        raise never_begun()

    def unary_unary(self, method: str) -> object:
        async def call(request: bytes, **terms: object) -> bytes:
            raise never_begun()

        return call


def test_the_load_generator_counts_them_by_their_status() -> None:
    sent = asyncio.run(open_loop([Stopped()], np.zeros(3), 1.0))
    found = figures(sent, 1.0, 1.0)
    assert (found["errors"], found["answered_per_s"], found["in_time_share"]) == ({"CANCELLED": 3}, 0, 0)


def test_a_replay_counts_them_as_failed() -> None:
    queries = [Query(number, "CIFAR10", 0.0, 1.0, 0.5) for number in range(3)]
    ended = asyncio.run(replay.replay([Stopped()], queries, {"CIFAR10": [(b"", 0)]}))  # type: ignore[list-item]
    assert [each.outcome for each in ended] == [Outcome.FAILED] * 3
    assert replay.figures(ended, paper_profile())["outcomes"]["failed"] == 1
