"""A replay in real time on several executors: the engine that also serves, with the trace's callers."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from isthmus.cloud.elastic.model.executor import Executor, Item
from isthmus.cloud.elastic.scheduling.engine import Engine, Overloaded
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Ran, Run
from isthmus.cloud.elastic.serve.live import Answer, LiveEngine
from isthmus.proto.errors import IsthmusError, TooLate

Asked = Callable[[Query], tuple[Item, int]]
"""Returns what a query asks about, and the right label."""
_End = tuple[Outcome | None, Answer | None]


def serve_at_once(
    engine: Engine,
    queries: Sequence[Query],
    executors: Sequence[Executor],
    asked: Asked,
    *,
    on_start: Callable[[], None] = lambda: None,
) -> Run:
    """Serves the queries in real time with as many executors as the engine has. Returns what happened.

    ``queries`` have ascending arrivals, and ids from 0 in that order. Executors outside this process are ended.
    """
    return asyncio.run(_served(engine, queries, executors, asked, on_start))


async def _served(
    engine: Engine, queries: Sequence[Query], executors: Sequence[Executor], asked: Asked, on_start: Callable[[], None]
) -> Run:
    began_s = time.monotonic()

    def now_s() -> float:
        return time.monotonic() - began_s

    live = LiveEngine(engine, *executors, clock=now_s, on_start=on_start)
    live.start()
    try:
        ends = await asyncio.gather(*(_ask(live, query, asked, now_s) for query in queries))
        end_s = now_s()
    finally:
        await asyncio.to_thread(live.stop)
    return _summed(engine, queries, ends, end_s)


async def _ask(live: LiveEngine, query: Query, asked: Asked, now_s: Callable[[], float]) -> _End:
    await asyncio.sleep(query.arrival_s - now_s())
    item, label = asked(query)
    latency_s = query.deadline_s - query.arrival_s
    try:
        answer = await live.ask(
            item.task, item.image, arrival_s=query.arrival_s, latency_s=latency_s, utility=query.utility
        )
    except TooLate:
        return Outcome.EVICTED, None
    except Overloaded:
        return None, None
    except IsthmusError:
        return Outcome.FAILED, None
    if not answer.in_time:
        return Outcome.LATE, answer
    right = int(answer.logits_C.argmax()) == label
    return (Outcome.CORRECT_IN_TIME if right else Outcome.WRONG_IN_TIME), answer


def _summed(engine: Engine, queries: Sequence[Query], ends: Sequence[_End], end_s: float) -> Run:
    run = Run([outcome for outcome, _ in ends], [], end_s=end_s)
    accuracy = engine.profile.accuracy
    # Queries of one batch have the same start, but for rounding, and the same time of it.
    batches: dict[tuple[float, float, int], list[tuple[Query, Outcome | None]]] = defaultdict(list)
    for query, (outcome, answer) in zip(queries, ends, strict=True):
        if answer is not None:
            start_s = round(query.arrival_s + answer.queue_s, 6)
            batches[start_s, answer.run_s, answer.gamma].append((query, outcome))
    for (start_s, run_s, gamma), together in sorted(batches.items(), key=lambda each: each[0]):
        shares = [accuracy[query.task][gamma] for query, _ in together]
        expected = sum(
            share * query.utility
            for share, (query, outcome) in zip(shares, together, strict=True)
            if outcome in IN_TIME
        )
        run.waits_s += [start_s - query.arrival_s for query, _ in together]
        run.utility += sum(query.utility for query, outcome in together if outcome is Outcome.CORRECT_IN_TIME)
        run.expected_utility += expected
        run.batches.append(Ran(start_s, start_s + run_s, gamma, len(together), sum(shares) / len(shares), expected))
    return run
