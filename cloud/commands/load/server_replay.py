"""The work of ``isthmus elastic replay --server``: send the queries of a trace to a running server, and simulate them.

It sends from a process of its own, by gRPC. It needs no torch.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import typer

from isthmus.cloud.commands.options import ReplayOptions
from isthmus.cloud.elastic.policies.by_name import make_policy
from isthmus.cloud.elastic.policies.infaas import ModelSize, memory_named
from isthmus.cloud.elastic.policies.infaas import simulated as infaas
from isthmus.cloud.elastic.scheduling.bound import clairvoyant_bound
from isthmus.cloud.elastic.scheduling.engine import Engine, Work
from isthmus.cloud.elastic.scheduling.policy import EPSILON
from isthmus.cloud.elastic.scheduling.profile import Profile
from isthmus.cloud.elastic.scheduling.query import IN_TIME, Outcome, Query
from isthmus.cloud.elastic.scheduling.simulate import Run, draws, simulate
from isthmus.cloud.elastic.tasks.recipes import LEFT_OUT, read_recipe
from isthmus.cloud.load.callers import channel_to, with_key
from isthmus.cloud.load.replay import Ended, Pictures, Place, figures, replay, right_at, warm_up
from isthmus.command_line import key_in
from isthmus.data.files import write_atomically
from isthmus.data.images import Columns, read_encoded
from isthmus.proto.errors import from_status

OPEN_S: Final = 60.0
SETTLE_S: Final = 2.0
"""Seconds between warming up and the first query: the server's arrival rate must forget the former."""


def pictures_of(tasks: Path, data: Path, limit: int | None, seed: int, columns: Columns, names: set[str]) -> Pictures:
    """Return the labelled pictures of every task of the folder that is among ``names``, in a random order.

    Raises ValueError if there is none, or if a recipe does not fit the labels.
    """
    found = read_encoded(data, columns=columns)
    order_N = np.random.default_rng(seed).permutation(len(found))[:limit].tolist()
    made: dict[str, list[tuple[bytes, int]]] = {}
    for path in sorted(tasks.glob("*.recipe.json")):
        recipe = read_recipe(str(path))
        if recipe.name not in names:
            continue
        classes = recipe.class_of_label
        if max(label for _, label in found) >= len(classes):
            raise ValueError(f"task {recipe.name!r} lists {len(classes)} labels; {data.name} has higher ones")
        chosen = [(found[place][0], classes[found[place][1]]) for place in order_N]
        made[recipe.name] = [(encoded, label) for encoded, label in chosen if label != LEFT_OUT]
        if not made[recipe.name]:
            raise ValueError(f"task {recipe.name!r} has no pictures in {data.name}")
    if not made:
        raise ValueError(f"{tasks.name} holds none of the profile's tasks: {', '.join(sorted(names)) or 'it has none'}")
    return made


def check(asked: ReplayOptions) -> None:
    """Raise ValueError for options that do not go with --server."""
    profiled = asked.profile is not None or asked.variants is not None
    if not profiled or asked.tasks is None or asked.data is None:
        raise ValueError("--server needs --profile (the server's) or --variants, --tasks and --data")
    if asked.live or asked.warm is not None or asked.margin is not None:
        raise ValueError("--server serves as it was started: leave out --live, --warm and --margin")
    if asked.paired and memory_named(asked.policy) is not None:
        raise ValueError("--paired asks for answers at given gammas, which INFaaS has none of: leave it out")


def replay_on_server(
    asked: ReplayOptions,
    measured: Profile,
    queries: Sequence[Query],
    pictures: Pictures,
    sizes: tuple[ModelSize, ...] | None = None,
) -> None:
    """Send the queries, simulate them, print both, and write the figures to ``asked.out`` if it is given.

    With ``sizes``, the server chooses among models of these sizes (INFaaS), and ``measured`` is their profile.

    The figures are written before the server is asked for answers in pairs, and once more with these. Raises
    IsthmusError if the server does not answer, a task is not registered, or, after the figures are printed and written,
    if it did not answer all questions in pairs. Raises ValueError if the profile is not the server's.
    """
    if asked.paired and measured.experts:
        raise ValueError("--paired asks for answers at given gammas, and experts are a second choice: leave it out")
    found: dict[str, Any] = {}
    refused: list[grpc.aio.AioRpcError] = []
    bound = clairvoyant_bound(queries, measured, EPSILON, executors=asked.executors)

    async def both() -> dict[str, Any]:
        async with _connected(asked) as channels:
            ended, share = await _sent(asked, measured, queries, pictures, channels)
            found.update(figures(ended, measured), generator_processor_share=share)
            outside_s = (found["outside_ms"] or {"p50": 0.0})["p50"] / 1e3
            runs = _simulated(asked, measured, queries, found["took"], outside_s, sizes)
            if asked.paired:
                found["paired"] = {"missing": "the replay was stopped before the server was asked"}
                _write(asked, {"bound": bound, **found}, runs)
                known, found["paired"], error = await _right(asked, ended, runs, pictures, channels)
                refused.extend([] if error is None else [error])
                for run in runs.values():
                    run |= _paired(run["in_time"], known, measured, pictures)
            _write(asked, {"bound": bound, **found}, runs)
            return runs

    try:
        simulated = asyncio.run(both())
    except grpc.aio.AioRpcError as error:
        raise from_status(error.code().value[0], error.details() or "") from error
    typer.echo(f"{asked.policy} on {asked.trace}, by the server, load {asked.load:g}, seed {asked.seed}:")
    typer.echo(
        f"{len(queries)} queries; utility of right answers {found['utility']:.1f} (expected "
        f"{found['expected_utility']:.1f}; no policy passes {bound:.1f})"
    )
    for name, each in simulated.items():
        could = each["expected_utility"]
        if not could:  # no query could be in time
            typer.echo(f"{name}: expected utility 0")
            continue
        right, expected = (found[of] / could - 1 for of in ("utility", "expected_utility"))
        typer.echo(
            f"{name}: expected utility {could:.1f}; on the server right answers earn {right:+.2%}, "
            f"expected ones {expected:+.2%}"
        )
        if "right_utility" in each:
            over = found["utility"] / each["right_utility"] - 1 if each["right_utility"] else 0.0
            typer.echo(
                f"  in pairs: by the server's own answers ({each['answered']:.1%} known), the simulation earns "
                f"{each['right_utility']:.1f}; right answers earn {over:+.2%} more on the server"
            )
    for outcome, share in found["outcomes"].items():
        if share:
            typer.echo(f"  {outcome.replace('_', ' ')}: {share:.2%}")
    typer.echo(
        f"{found['batches']} batches, mean size {found['mean_batch_size']:.1f}. They took {found['took']:.3f} times as "
        "long as the profile says."
    )
    typer.echo(f"The load generator used {found['generator_processor_share']:.0%} of a processor core.")
    if asked.out is not None:
        typer.echo(f"written: {asked.out}")
    missing = found.get("paired", {}).get("missing")
    if missing:
        typer.echo(
            f"answers in pairs are missing: the server answered {found['paired']['answered']} of "
            f"{found['paired']['asked']} questions, then said {missing}. What is not known counts by its accuracy.",
            err=True,
        )
    for refusal in refused:
        if refusal.code() is not grpc.StatusCode.INVALID_ARGUMENT:  # a policy may choose gamma itself
            why = f"the questions in pairs failed: {refusal.details() or ''}"
            raise from_status(refusal.code().value[0], why) from refusal


def _write(asked: ReplayOptions, found: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the figures to ``asked.out`` if it is given."""
    if asked.out is not None:
        plain = {name: {key: of for key, of in run.items() if key != "in_time"} for name, run in runs.items()}
        figures = {"policy": asked.policy, "load": asked.load, "seed": asked.seed, **found, "simulated": plain}
        write_atomically(asked.out, json.dumps(figures, indent=1) + "\n")


@asynccontextmanager
async def _connected(asked: ReplayOptions) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Open the connections. Raises ValueError if the server does not answer."""
    assert asked.server is not None
    certificate = None if asked.tls_cert is None else asked.tls_cert.read_bytes()
    channels = [channel_to(asked.server, certificate) for _ in range(asked.connections)]
    try:
        try:
            await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), OPEN_S)
        except TimeoutError:
            raise ValueError(f"{asked.server}: not all connections were open within {OPEN_S:g} s") from None
        yield channels
    finally:
        for channel in channels:
            await channel.close()


async def _sent(
    asked: ReplayOptions,
    measured: Profile,
    queries: Sequence[Query],
    pictures: Pictures,
    channels: Sequence[grpc.aio.Channel],
) -> tuple[list[Ended], float]:
    """Warm the server up and send the queries. Return how each ended, and the share of a core that sending took."""
    metadata = with_key(key_in(asked.key_file))
    able = {task: [gamma for gamma in measured.gammas if measured.accuracy[task][gamma] > 0] for task in pictures}
    swaps = memory_named(asked.policy) is not None
    for task, gammas in able.items():
        if swaps:  # many at once would make the server begin with small models, and the simulation does not
            await warm_up(channels[0], {task: pictures[task]}, [0], metadata, sizes=[1])
        else:
            await warm_up(channels[0], {task: pictures[task]}, gammas, metadata)
    await asyncio.sleep(SETTLE_S)
    began_s, worked_s = time.perf_counter(), time.process_time()
    ended = await replay(channels, queries, pictures, metadata)
    return ended, (time.process_time() - worked_s) / (time.perf_counter() - began_s)


async def _right(
    asked: ReplayOptions,
    ended: Sequence[Ended],
    runs: Mapping[str, Any],
    pictures: Pictures,
    channels: Sequence[grpc.aio.Channel],
) -> tuple[dict[Place, bool], dict[str, Any], grpc.aio.AioRpcError | None]:
    """Return which of the answers that the simulations gave in time are right, by asking the server for those.

    What the replay itself has shown is not asked again. Also return how many questions were asked and answered, with
    the reason if some are missing, and the refusal that ended them.
    """
    known = {_place(each.query, each.gamma, pictures): each.right for each in ended if each.gamma is not None}
    needed = {_place(query, gamma, pictures) for run in runs.values() for query, gamma in run["in_time"]}
    places = needed - known.keys()
    answers, error = await right_at(channels, pictures, places, with_key(key_in(asked.key_file)))
    why = None if error is None else f"{error.code().name}: {error.details()}"
    return known | answers, {"asked": len(places), "answered": len(answers), "missing": why}, error


def _paired(
    in_time: Sequence[tuple[Query, int]], known: Mapping[Place, bool], measured: Profile, pictures: Pictures
) -> dict[str, float]:
    """Return the utility of the right ones among a simulation's answers in time, and of how many that is known.

    An answer that is not known counts by its accuracy.
    """
    places = [_place(query, gamma, pictures) for query, gamma in in_time]
    return {
        "right_utility": sum(
            query.utility * known.get(place, measured.accuracy[query.task][gamma])
            for (query, gamma), place in zip(in_time, places, strict=True)
        ),
        "answered": sum(place in known for place in places) / max(1, len(places)),
    }


def _place(query: Query, gamma: int, pictures: Pictures) -> Place:
    return query.task, query.id % len(pictures[query.task]), gamma


def _simulated(
    asked: ReplayOptions,
    measured: Profile,
    queries: Sequence[Query],
    took: float,
    outside_s: float,
    sizes: tuple[ModelSize, ...] | None,
) -> dict[str, Any]:
    """Return the sums of the same queries simulated: as the profile says, and as the replay was.

    The latter is at the pace ``took`` of its batches, and with ``outside_s`` more until the client has an answer.
    INFaaS keeps the profile's pace. ``expected_utility`` is the mean of the utility over all draws of which answers are
    right. ``in_time`` lists the queries that were in time, each with its gamma.
    """
    memory_bytes = memory_named(asked.policy)
    luck_N = draws(np.random.default_rng([asked.seed, 1]), len(queries))

    def at(pace: float, outside_s: float) -> dict[str, Any]:
        ended: dict[int, tuple[int, float]] = {}
        loading_s: Callable[[Work], float] | None = None
        if memory_bytes is None:
            engine = Engine(measured, make_policy(asked.policy, measured), executors=asked.executors)
        else:
            _, policy, loading_s = infaas(measured, memory_bytes, asked.executors, sizes=sizes)
            engine = Engine(measured, policy, adapts=False, executors=asked.executors)

        def takes_s(work: Work) -> float:
            paced_s = pace * measured.batch_time_s(work.gamma, len(work.batch))
            took_s = paced_s if loading_s is None else loading_s(work)
            ended.update((query.id, (work.gamma, work.started_s + took_s)) for query in work.batch.queries)
            return took_s

        return sums(simulate(engine, queries, luck_N, takes_s), ended, queries, measured, outside_s)

    way = f"with {1e3 * outside_s:.1f} ms on the way"
    if memory_bytes is None:
        return {
            "simulated": at(1.0, 0.0),
            f"simulated at {took:.3f} of the profile's times, {way}": at(took, outside_s),
        }
    # How long a batch took on the server includes loading its model, so it says nothing of the server's pace.
    return {"simulated": at(1.0, 0.0), f"simulated {way}": at(1.0, outside_s)}


def sums(
    run: Run, ended: Mapping[int, tuple[int, float]], queries: Sequence[Query], measured: Profile, outside_s: float
) -> dict[str, Any]:
    """Return the sums of a simulation whose answers need ``outside_s`` more to reach the client.

    ``ended``: gamma and end of each query that ran. The server counts from a query's arrival there, and so does not
    know of this time.
    """
    outcomes = list(run.outcomes)
    for query in queries:
        if outcomes[query.id] in IN_TIME and ended[query.id][1] + outside_s > query.deadline_s:
            outcomes[query.id] = Outcome.LATE
    in_time = [(query, ended[query.id][0]) for query in queries if outcomes[query.id] in IN_TIME]
    return {
        "utility": sum(query.utility for query in queries if outcomes[query.id] is Outcome.CORRECT_IN_TIME),
        "expected_utility": sum(query.utility * measured.accuracy[query.task][gamma] for query, gamma in in_time),
        "outcomes": {outcome.value: outcomes.count(outcome) / max(1, len(outcomes)) for outcome in Outcome},
        "in_time": in_time,
    }
