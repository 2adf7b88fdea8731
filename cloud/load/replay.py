"""Replay queries of elastic serving on a running server in real time, and say how each of them ended.

Unlike a replay inside the serving process, everything that a client waits for counts: the connection, the reading of
the picture, the event loop. In time means that the answer was here within the query's latency since it was due.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

from isthmus.cloud.elastic.scheduling.levels import gamma_of, level_of, said
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query
from isthmus.cloud.load.callers import MAKE_QUERY, Metadata
from isthmus.cloud.load.outcomes import percentiles_ms
from isthmus.proto.v1 import elastic_pb2 as pb

GIVE_UP_S: Final = 20.0
"""A call is given up so long after its deadline."""
WARM_UP_SIZES: Final = (1, 64)
WARM_UP_LATENCY_S: Final = 60.0
TOGETHER: Final = 64
"""Pictures that are asked for at once after a replay."""

Pictures = Mapping[str, Sequence[tuple[bytes, int]]]
"""The labelled pictures of each task: a JPEG or PNG file, and the index of its class."""
Place = tuple[str, int, int]
"""A task, one of its pictures, and a gamma."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a query ended.

    ``outcome`` is None if the server refused it because too many were waiting. Without an answer, ``gamma`` and
    ``run_s`` are None. ``lag_s``: how late it was sent. ``latency_s``: from when it was due until it ended.
    ``queue_s``: how long it waited within the server. ``experts``: how many each token used; 0 if the model has none.
    ``right``: whether its answer was right, also if that was late.
    """

    query: Query
    outcome: Outcome | None
    lag_s: float
    latency_s: float
    gamma: int | None = None
    run_s: float | None = None
    experts: int = 0
    queue_s: float = 0.0
    right: bool = False

    def level(self, profile: Profile) -> int | None:
        """Returns the level at which it ran, as the profile names it (``levels.py``), or None without an answer."""
        if self.gamma is None:
            return None
        fewer = profile.experts - self.experts
        return level_of(self.gamma, fewer) if self.experts and fewer > 0 else self.gamma


async def warm_up(
    channel: grpc.aio.Channel,
    pictures: Pictures,
    levels: Sequence[int],
    metadata: Metadata = (),
    sizes: Sequence[int] = WARM_UP_SIZES,
) -> None:
    """Asks for one and for many pictures of every task at every gamma, so that no query of the replay is the first.

    ``sizes`` are how many are asked for at once. Where the server's policy fixes gamma itself, it decides. Raises
    grpc.aio.AioRpcError, for example if a task is not registered.
    """
    call: Any = channel.unary_unary(MAKE_QUERY)

    async def ask(request: pb.MakeQueryRequest, count: int) -> None:
        data = request.SerializeToString()
        await asyncio.gather(*(call(data, timeout=2 * WARM_UP_LATENCY_S, metadata=metadata) for _ in range(count)))

    for task, labelled in pictures.items():
        for gamma in sorted({gamma_of(level) for level in levels}):
            request = pb.MakeQueryRequest(task=task, encoded=labelled[0][0], latency_s=WARM_UP_LATENCY_S, gamma=gamma)
            try:
                await ask(request, sizes[0])
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                request.ClearField("gamma")
            for size in sizes:
                await ask(request, size)


async def replay(
    channels: Sequence[grpc.aio.Channel], queries: Sequence[Query], pictures: Pictures, metadata: Metadata = ()
) -> list[Ended]:
    """Sends each query when it is due, over the channels in turn, and waits for all outcomes, in the queries' order.

    Query i asks about picture i of its task, modulo the number of pictures.
    """
    calls: list[Any] = [channel.unary_unary(MAKE_QUERY) for channel in channels]
    began_s = time.perf_counter()
    ended = []
    for number, query in enumerate(queries):
        await asyncio.sleep(max(0.0, began_s + query.arrival_s - time.perf_counter()))
        labelled = pictures[query.task]
        sent = _one(calls[number % len(calls)], query, labelled[query.id % len(labelled)], began_s, metadata)
        ended.append(asyncio.create_task(sent))
    return list(await asyncio.gather(*ended))


async def _one(call: Any, query: Query, picture: tuple[bytes, int], began_s: float, metadata: Metadata) -> Ended:
    encoded, label = picture
    allowed_s = query.deadline_s - query.arrival_s
    request = pb.MakeQueryRequest(
        task=query.task, encoded=encoded, latency_s=allowed_s, utility=query.utility
    ).SerializeToString()
    lag_s = time.perf_counter() - began_s - query.arrival_s

    def latency_s() -> float:
        return time.perf_counter() - began_s - query.arrival_s

    try:
        data = await call(request, timeout=allowed_s + GIVE_UP_S, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        outcomes: dict[grpc.StatusCode, Outcome | None] = {
            grpc.StatusCode.DEADLINE_EXCEEDED: Outcome.EVICTED,
            grpc.StatusCode.RESOURCE_EXHAUSTED: None,
        }
        return Ended(query, outcomes.get(error.code(), Outcome.FAILED), lag_s, latency_s())
    took_s = latency_s()
    answer = pb.MakeQueryResponse.FromString(data)
    right = answer.class_index == label
    in_time = Outcome.CORRECT_IN_TIME if right else Outcome.WRONG_IN_TIME
    outcome = in_time if took_s <= allowed_s else Outcome.LATE
    return Ended(query, outcome, lag_s, took_s, answer.gamma, answer.run_s, answer.experts, answer.queue_s, right)


async def right_at(
    channels: Sequence[grpc.aio.Channel], pictures: Pictures, places: Iterable[Place], metadata: Metadata = ()
) -> tuple[dict[Place, bool], grpc.aio.AioRpcError | None]:
    """Asks for pictures at fixed gammas, without hurry and a batch at a time, and returns which answers were right.

    It stops at the first refusal, and returns that beside the answers until then: a replay of minutes is not lost
    because of one question. A policy that chooses gamma itself refuses the first ones, as INVALID_ARGUMENT.
    """
    calls: list[Any] = [channel.unary_unary(MAKE_QUERY) for channel in channels]
    # Queries of one gamma are asked together, as they can share a batch.
    ordered = sorted(set(places), key=lambda place: (place[2], place))
    found: dict[Place, bool] = {}

    async def ask(number: int, place: Place) -> None:
        task, at, gamma = place
        encoded, label = pictures[task][at]
        request = pb.MakeQueryRequest(task=task, encoded=encoded, latency_s=WARM_UP_LATENCY_S, gamma=gamma)
        call = calls[number % len(calls)]
        data = await call(request.SerializeToString(), timeout=2 * WARM_UP_LATENCY_S, metadata=metadata)
        found[place] = pb.MakeQueryResponse.FromString(data).class_index == label

    for first in range(0, len(ordered), TOGETHER):
        some = ordered[first : first + TOGETHER]
        asked = (ask(number, place) for number, place in enumerate(some))
        for error in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(error, grpc.aio.AioRpcError):
                return found, error
            if error is not None:
                raise error
    return found, None


def figures(ended: Sequence[Ended], profile: Profile) -> dict[str, Any]:
    """Returns the sums of a replay, named as those of 'isthmus elastic replay'.

    ``utility`` adds up right answers in time. ``expected_utility`` adds up, for all answers in time, the profile's
    accuracy times the utility. Answers of the same batch have the same run time. If the model has experts, ``gammas``
    counts levels. ``outside_ms`` is what clients waited for besides queue and batch: sending, network, reading of
    pictures. Raises ValueError for an answer at a gamma that the profile lacks.
    """
    levels = [each.level(profile) for each in ended]
    if unknown := sorted({level for level in levels if level is not None} - {*profile.gammas}):
        raise ValueError(
            f"the server answered at {', '.join(said(level, profile.experts) for level in unknown)}, which the profile "
            "lacks: --profile must be the server's"
        )
    placed = [(each, level) for each, level in zip(ended, levels, strict=True) if level is not None]
    batches = Counter((level, each.run_s) for each, level in placed if each.run_s is not None)
    gammas = Counter(level for _, level in placed)
    profiled_s = sum(profile.batch_time_s(level, size) for (level, _), size in batches.items())
    ran_s = sum(run_s for _, run_s in batches)
    accuracy = profile.accuracy
    return {
        "queries": len(ended),
        "utility": sum(each.query.utility for each in ended if each.outcome is Outcome.CORRECT_IN_TIME),
        "expected_utility": sum(
            each.query.utility * accuracy[each.query.task][level] for each, level in placed if each.outcome in IN_TIME
        ),
        "outcomes": {
            outcome.value: sum(each.outcome is outcome for each in ended) / max(1, len(ended)) for outcome in Outcome
        },
        "refused": sum(each.outcome is None for each in ended),
        "batches": len(batches),
        "mean_batch_size": batches.total() / max(1, len(batches)),
        "took": ran_s / profiled_s if profiled_s else 1.0,
        "gammas": {str(gamma): gammas[gamma] for gamma in profile.gammas},
        "latency_ms": percentiles_ms([each.latency_s for each in ended if each.gamma is not None]),
        "outside_ms": percentiles_ms([each.latency_s - each.queue_s - each.run_s for each, _ in placed if each.run_s]),
        "generator_lag_ms": percentiles_ms([each.lag_s for each in ended]),
    }
