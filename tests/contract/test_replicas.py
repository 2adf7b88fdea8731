"""Replicas that the server runs, in processes and on Ray: the model's own answers, moves, and what dies comes back."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from isthmus.cloud.generation.scheduling.profile import reference_profile
from isthmus.cloud.generation.scheduling.request import Outcome, Sampling
from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.live import Done, Piece
from isthmus.cloud.generation.serve.relay import Relay
from isthmus.cloud.generation.serve.serving import Answering, Wishes
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.replicas.hosted import Hosted
from isthmus.cloud.replicas.opening import opened
from isthmus.proto.errors import InvalidInput, IsthmusError, TooLate, Unavailable
from tests.rigs.generation.llama import save_tiny_llama
from tests.rigs.project.processes import descendants

WAIT_S = 600.0
MESSAGES = [{"role": "user", "content": "Come back!"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas") / "tiny"
    # No end token, so that every answer has its full length. It is long enough to be in the middle of it.
    save_tiny_llama(folder, eos_token_id=[], max_position_embeddings=4_096)
    return folder


@pytest.fixture(scope="module", params=["process", "ray"])
def executor(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)


@dataclass
class Rig:
    """Replicas behind their front, on a loop of the test's own."""

    answering: Answering
    relay: Relay
    hosts: list[Hosted]
    drained: Path
    read_drained: Callable[[], None]

    def drain(self, *names: str) -> None:
        self.drained.write_text("\n".join(names))
        self.read_drained()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let no replica run during the block."""
        pids = [host.pid for host in self.hosts if host.pid is not None]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def kill(self, at: int) -> None:
        pid = self.hosts[at].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


Ran = Callable[..., None]
Act = Callable[[Rig], Coroutine[Any, Any, None]]


@asynccontextmanager
async def serving(settings: GenerationSettings, drained: Path) -> AsyncIterator[Rig]:
    drained.write_text("")
    async with opened(replace(settings, drained=drained)) as found:
        relay: Any = found.answering
        hosts = [upstream._carrier for upstream in relay._upstreams]
        yield Rig(found.answering, relay, hosts, drained, found.read_drained)


@pytest.fixture(scope="module")
def settings(folder: Path, executor: str, tmp_path_factory: pytest.TempPathFactory) -> GenerationSettings:
    profile = tmp_path_factory.mktemp("profile") / "profile.json"
    profile.write_text(reference_profile().to_json())
    return GenerationSettings(
        folder, replicas=2, executor=executor, rows=4, kv_tokens=8_192, max_tokens=4_000, profile=profile
    )


@pytest.fixture(scope="module")
def shared(settings: GenerationSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Runs scenarios with two replicas, which all of them share."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        drained = tmp_path_factory.mktemp("drained") / "drained"
        rig = runner.run(stack.enter_async_context(serving(settings, drained)))

        async def undisturbed(act: Act) -> None:
            until_s = time.monotonic() + WAIT_S
            while not all(host.pid for host in rig.hosts) or not all(each.open for each in rig.relay.standings()):
                assert time.monotonic() < until_s
                await asyncio.sleep(0.05)
            try:
                await asyncio.wait_for(act(rig), WAIT_S)
            finally:
                rig.drain()

        yield lambda act: runner.run(undisturbed(act))
        runner.run(stack.aclose())


@pytest.fixture
def run(settings: GenerationSettings, tmp_path: Path) -> Ran:
    """Runs a scenario with replicas of its own, whose settings may differ."""

    def scenario(act: Act, **changes: Any) -> None:
        async def whole() -> None:
            async with serving(replace(settings, **changes), tmp_path / "drained") as rig:
                await act(rig)

        asyncio.run(asyncio.wait_for(whole(), WAIT_S))

    return scenario


def wishes(tokens: int, seed: int = 5, **further: Any) -> Wishes:
    return Wishes(max_tokens=tokens, sampling=Sampling(0.9, 1.0, seed), **further)


async def text_of(answer: Any, act: Callable[[int], None] = lambda at: None) -> tuple[str, Done]:
    """Reads an answer, and calls ``act`` after every piece with how many there were."""
    pieces: list[str] = []
    done: Done | None = None
    async for item in answer:
        if isinstance(item, Piece):
            pieces.append(item.text)
            act(len(pieces))
        else:
            done = item
    assert done is not None
    return "".join(pieces), done


ASKED = ((8, 5), (1_500, 5), (800, 0), (800, 1), *((60, seed) for seed in range(6)))
"""Lengths and seeds of answers."""


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[tuple[int, int], str]:
    """The answers of one model in this process, to which nothing happens."""
    generation = open_generation(GenerationSettings(folder, max_tokens=4_000, kv_tokens=8_192))

    async def every() -> dict[tuple[int, int], str]:
        generation.live.start()
        answers = [await generation.chat(MESSAGES, wishes(*each)) for each in ASKED]
        texts = [text for text, _ in await asyncio.gather(*map(text_of, answers))]
        await asyncio.to_thread(generation.live.stop)
        return dict(zip(ASKED, texts, strict=True))

    try:
        return asyncio.run(every())
    finally:
        generation.close()


def test_answers_are_the_models_own_and_both_replicas_work(shared: Ran, alone: dict[tuple[int, int], str]) -> None:
    async def scenario(rig: Rig) -> None:
        with rig.stopped():  # so none has answered before the last one is asked
            asked = [await rig.answering.chat(MESSAGES, wishes(60, seed)) for seed in range(6)]
            used = {rig.relay._front.at(each.id) for each in asked if each.id is not None}
        found = await asyncio.gather(*(text_of(each) for each in asked))
        assert used == {0, 1}, "the freest one gets the next request"
        for seed, (text, done) in enumerate(found):
            assert text == alone[60, seed]
            assert (done.reason, done.outcome, done.tokens) == ("length", Outcome.FINISHED, 60)
        prompts = {done.prompt_tokens for _, done in found}
        assert prompts == {await rig.relay._counts.of_chat(MESSAGES)}, "the front counts as its replicas do"

    shared(scenario)


def test_what_is_wrong_is_refused_and_who_leaves_is_forgotten(shared: Ran) -> None:
    async def scenario(rig: Rig) -> None:
        with pytest.raises(InvalidInput, match="prompt"):
            await rig.answering.complete("", wishes(8))
        with pytest.raises(InvalidInput):
            await rig.answering.complete("words " * 5_000, wishes(8))
        answer = await rig.answering.complete("the words", wishes(3_000))
        async for _ in answer:
            answer.cancel()
            break
        assert rig.relay.numbers().under_way == 0
        # Its row is free at the replica, too: a whole batch of others gets there.
        others = [await rig.answering.complete("the words", wishes(4, seed)) for seed in range(8)]
        for each in others:
            assert (await text_of(each))[1].tokens == 4

    shared(scenario)


def test_a_policy_that_chooses_rows_gets_the_wishes_that_it_needs(run: Ran) -> None:
    async def scenario(rig: Rig) -> None:
        with pytest.raises((TooLate, Unavailable)):
            await text_of(await rig.answering.complete("the words", wishes(3_000, latency_s=0.02)))
        text, done = await text_of(await rig.answering.complete("the words", wishes(8, latency_s=60.0)))
        assert done.in_time and text

    run(scenario, policy="paced", replicas=1)


def test_a_drained_replica_is_left_at_once_and_the_stream_goes_on(
    shared: Ran, alone: dict[tuple[int, int], str]
) -> None:
    async def scenario(rig: Rig) -> None:
        answer = await rig.answering.chat(MESSAGES, wishes(1_500))
        source = rig.relay._front.at(answer.id)
        text, _ = await text_of(answer, lambda at: rig.drain(f"replica-{source + 1}") if at == 50 else None)
        assert text == alone[1_500, 5]
        numbers = rig.relay.numbers()
        assert sum(numbers.moves.values()) == 1 and not numbers.moves["failed"]
        assert sum(numbers.times["pause"].counts) == 1
        rig.drain("replica-1")
        later = await rig.answering.chat(MESSAGES, wishes(4))
        assert rig.relay._front.at(later.id) == 1
        await text_of(later)

    shared(scenario)


def test_the_requests_of_a_killed_one_go_on_elsewhere_and_it_comes_back(
    shared: Ran, alone: dict[tuple[int, int], str]
) -> None:
    async def scenario(rig: Rig) -> None:
        answers = [await rig.answering.chat(MESSAGES, wishes(800, seed)) for seed in range(2)]
        at_first = {rig.relay._front.at(each.id) for each in answers}
        killed: list[int] = []

        def act(at: int) -> None:
            if at == 40 and not killed:
                killed.append(1)
                rig.kill(0)

        texts = await asyncio.gather(*(text_of(each, act) for each in answers))
        assert at_first == {0, 1} and [text for text, _ in texts] == [alone[800, seed] for seed in range(2)]
        until_s = time.monotonic() + WAIT_S
        while rig.hosts[0].pid is None or rig.hosts[0].starts < 2:
            assert time.monotonic() < until_s
            await asyncio.sleep(0.05)
        rig.drain("replica-2")
        answer = await rig.answering.chat(MESSAGES, wishes(8))
        assert (await text_of(answer))[0] == alone[8, 5]

    shared(scenario)


def test_if_all_are_killed_a_request_waits_for_one_or_is_refused_clearly(
    run: Ran, alone: dict[tuple[int, int], str]
) -> None:
    async def scenario(rig: Rig) -> None:
        rig.kill(0)
        patient = asyncio.create_task(_whole(rig, wishes(8)))
        hasty = asyncio.create_task(_whole(rig, wishes(8, ttft_s=0.2)))
        with pytest.raises(IsthmusError, match=r"in time|no replica|again"):
            await hasty
        assert (await patient)[0] == alone[8, 5]

    before = replica_processes()
    run(scenario, replicas=1)
    await_no_further(before)


async def _whole(rig: Rig, asked: Wishes) -> tuple[str, Done]:
    return await text_of(await rig.answering.chat(MESSAGES, asked))


def test_one_that_hangs_is_ended_and_started_again(run: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client gets the whole answer of the other one."""
    init = Hosted.__init__

    def hasty(self: Hosted, *given: Any, **named: Any) -> None:
        init(self, *given, **{**named, "check_s": 0.2, "patience_s": 8.0})

    monkeypatch.setattr(Hosted, "__init__", hasty)

    async def scenario(rig: Rig) -> None:
        pid = rig.hosts[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        until_s = time.monotonic() + WAIT_S
        while rig.hosts[0].pid in (None, pid):
            assert time.monotonic() < until_s
            await asyncio.sleep(0.05)
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # Ray ends it by and by
            assert time.monotonic() < until_s
            await asyncio.sleep(0.05)
        assert (await _whole(rig, wishes(8)))[1].tokens == 8

    run(scenario)


def test_a_profile_that_is_none_is_said_and_nothing_is_left(run: Ran, tmp_path: Path) -> None:
    async def never(rig: Rig) -> None:
        pytest.fail("it was opened")

    bad, before = tmp_path / "profile.json", replica_processes()
    bad.write_text("{}")
    with pytest.raises(InvalidInput, match=r"profile profile\.json"):
        run(never, profile=bad)
    await_no_further(before)


def await_no_further(before: set[int]) -> None:
    """Waits until no replica is left but those of ``before``."""
    until_s = time.monotonic() + WAIT_S
    while replica_processes() - before:
        assert time.monotonic() < until_s
        time.sleep(0.05)


def replica_processes() -> set[int]:
    """Returns the ids of processes with a replica that this process, or Ray, has started."""
    return descendants("isthmus.cloud.replicas.child", "ray::Actor")
