"""A running request moves to another replica: its client's stream goes on, whoever is killed during the move."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch

from isthmus.cloud.generation.model.kv import KVShape
from isthmus.cloud.generation.scheduling.request import Outcome
from isthmus.cloud.generation.serve.carrier import Lost
from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.moving import Moves, pack, unpack
from isthmus.cloud.generation.serve.relay import Relay
from isthmus.cloud.generation.serve.serving import Generation
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.generation.serve.upstream import Upstream
from isthmus.proto.errors import InvalidInput
from tests.rigs.generation.cut import Cut, cuttable
from tests.rigs.generation.llama import save_tiny_llama, serving_http
from tests.rigs.generation.replicas import serving_relay
from tests.rigs.project.patience import HANGS_S, until

MESSAGES: Any = [{"role": "user", "content": "Come back!"}]
ASKED: Any = {"model": "words", "messages": MESSAGES, "max_tokens": 120, "temperature": 0.9, "seed": 5}
LATE = 100
"""Tokens of an answer of 120 beyond which a replica goes on only when what a test waits for has happened."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moved") / "tiny"
    # No end token, so that every answer has its full length.
    save_tiny_llama(folder, eos_token_id=[])
    return folder


@dataclass
class Rig:
    """A front with two replicas. However fast they are, an answer does not end before its reader has acted.

    ``holds``: after so many tokens of an answer, steps wait until something has happened. A step goes on if other work
    waits for its end, which a move does.
    """

    replicas: list[Generation]
    relay: Relay
    urls: list[str]
    cuts: list[Cut]
    client: openai.OpenAI
    holds: tuple[tuple[int, Callable[[], bool]], ...] = ()

    def moved(self, times: int = 1) -> Callable[[], bool]:
        """Whether so many moves have ended, well or not."""
        return lambda: sum(self.relay.numbers().moves.values()) >= times

    def hold(self, generation: Generation) -> None:
        """Let the steps of a replica wait as ``holds`` says."""
        live, executor = generation.live, cast(Any, generation.live._executor)
        run = executor.run

        def held(step: Any) -> Any:
            def waits() -> bool:
                tokens = max((len(life.tokens) for life in [*live.engine.lives.values()]), default=0)
                return any(tokens >= most and not happened() for most, happened in self.holds)

            while waits() and not live._errands and live.ready:
                time.sleep(0.001)
            return run(step)

        executor.run = held

    def drain(self, at: int) -> None:
        self.on_loop(lambda: self.relay.drain(self.cuts[at].url))

    def on_loop(self, act: Callable[[], None]) -> None:
        (relayed,) = self.relay._open.values()
        assert relayed.task is not None
        relayed.task.get_loop().call_soon_threadsafe(act)

    def stream(self, act: Callable[[int], None], *holds: tuple[int, Callable[[], bool]], **asked: Any) -> str:
        """Streams an answer, calls ``act`` after every chunk with how many there were, and returns the text.

        Without ``holds`` it does not end before the request was moved, or could not be.
        """
        self.holds, pieces = holds or ((LATE, self.moved()),), []
        for at, chunk in enumerate(self.client.chat.completions.create(**{**ASKED, **asked}, stream=True)):
            act(at)
            pieces += [choice.delta.content or "" for choice in chunk.choices]
        return "".join(pieces)


@pytest.fixture
def rig(folder: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    layouts = getattr(request, "param", ("slots", "slots"))
    with ExitStack() as stack:
        replicas = [
            open_generation(GenerationSettings(folder, max_tokens=200, rows=4, kv_tokens=1_024, layout=layout))
            for layout in layouts
        ]
        urls = [stack.enter_context(serving_http(each, move_key="sesame")) for each in replicas]
        cuts = [stack.enter_context(cuttable(each)) for each in urls]
        relay, url = stack.enter_context(serving_relay([each.url for each in cuts], move_key="sesame"))
        openai_client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANGS_S)
        made = Rig(replicas, relay, urls, cuts, stack.enter_context(openai_client))
        for each in replicas:
            made.hold(each)
        yield made


def whole(rig: Rig, **asked: Any) -> str:
    """The answer of a request that is not moved."""
    with openai.OpenAI(base_url=f"{rig.urls[1]}/v1", api_key="none") as direct:
        return direct.chat.completions.create(**{**ASKED, **asked, "model": "tiny"}).choices[0].message.content or ""


@pytest.mark.parametrize(
    ("rig", "how"),
    [
        (("slots", "slots"), "blocks"),
        (("slots", "paged"), "blocks"),
        (("paged", "slots"), "blocks"),
        (("padded", "slots"), "tokens"),
        (("slots", "padded"), "tokens"),
    ],
    indirect=["rig"],
)
def test_a_drained_replica_is_empty_at_once_and_the_stream_goes_on(rig: Rig, how: str) -> None:
    expected = whole(rig)
    text = rig.stream(lambda at: rig.drain(0) if at == 20 else None)
    assert text == expected and len(text) > 60
    numbers = rig.relay.numbers()
    assert numbers.moves == {how: 1} and sum(numbers.times["pause"].counts) == 1
    source, target = (each.live.numbers() for each in rig.replicas)
    assert source.under_way == 0 and not source.outcomes, "it ended elsewhere"
    assert target.tokens < 2 * 120 and rig.replicas[1].moves.arrived == 1
    assert rig.replicas[0].moves.left == 1
    until(lambda: rig.replicas[0].live.numbers().free_blocks == 64)


def test_it_moves_there_and_back_again(rig: Rig) -> None:
    expected = whole(rig)

    def act(at: int) -> None:
        if at == 15:
            rig.drain(0)
        if at == 45:
            rig.on_loop(lambda: rig.relay.drain(rig.cuts[0].url, draining=False))
            rig.drain(1)

    assert rig.stream(act, (35, rig.moved()), (LATE, rig.moved(2))) == expected
    assert rig.relay.numbers().moves == {"blocks": 2}


def test_a_target_that_fails_leaves_the_request_where_it_is(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(self: Moves, handle: str, body: bytes) -> Any:
        raise InvalidInput("no room")

    expected = whole(rig)
    monkeypatch.setattr(Moves, "arrive", full)
    assert rig.stream(lambda at: rig.drain(0) if at == 20 else None) == expected
    assert rig.relay.numbers().moves == {"failed": 1}
    assert rig.replicas[0].live.numbers().outcomes and not rig.replicas[1].moves.arrived


def test_a_source_that_is_killed_between_send_and_commit_loses_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has sent the request, and breaks off before its place is freed: the new replica goes on."""
    expected, leave = whole(rig), Upstream.leave

    async def killed(self: Upstream, name: str, first: int | None) -> bytes:
        body = await leave(self, name, first)
        rig.cuts[0].cut()
        await asyncio.sleep(0.05)
        return body

    monkeypatch.setattr(Upstream, "leave", killed)
    assert rig.stream(lambda at: rig.drain(0) if at == 20 else None) == expected
    assert rig.relay.numbers().moves == {"blocks": 1}


def test_if_both_fail_the_request_begins_again_and_no_text_comes_twice(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, leave = whole(rig), Upstream.leave

    async def killed(self: Upstream, name: str, first: int | None) -> bytes:
        await leave(self, name, first)
        rig.cuts[0].cut()
        await asyncio.sleep(0.05)
        raise Lost("killed")

    monkeypatch.setattr(Upstream, "leave", killed)
    assert rig.stream(lambda at: rig.drain(0) if at == 20 else None) == expected
    assert rig.relay.numbers().moves == {"failed": 1}
    assert rig.replicas[1].live.numbers().outcomes


def test_a_target_that_is_killed_after_the_commit_is_replaced(rig: Rig) -> None:
    expected = whole(rig)

    def act(at: int) -> None:
        if at == 20:
            rig.drain(0)
        if at == 60:
            rig.on_loop(lambda: rig.relay.drain(rig.cuts[0].url, draining=False))
            rig.cuts[1].cut()

    assert rig.stream(act, (50, rig.moved()), (LATE, lambda: rig.cuts[1].is_cut)) == expected
    assert rig.relay.numbers().moves == {"blocks": 1}


def test_a_request_that_arrives_nowhere_goes_on_after_a_while(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.cloud.generation.serve.moving.PARKED_S", 0.1)

    async def lost(self: Upstream, name: str) -> None:
        raise Lost("the front could not say that it stays")

    async def full(self: Moves, handle: str, body: bytes) -> Any:
        raise InvalidInput("no room")

    monkeypatch.setattr(Upstream, "stay", lost)
    monkeypatch.setattr(Moves, "arrive", full)
    expected = whole(rig)
    assert rig.stream(lambda at: rig.drain(0) if at == 20 else None) == expected


def test_who_leaves_during_a_move_is_forgotten_by_both(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    leave, moving = Upstream.leave, threading.Event()

    async def held(self: Upstream, name: str, first: int | None) -> bytes:
        body = await leave(self, name, first)
        moving.set()
        await asyncio.sleep(0.3)
        return body

    monkeypatch.setattr(Upstream, "leave", held)
    rig.holds = ((LATE, rig.moved()),)
    stream = rig.client.chat.completions.create(**ASKED, stream=True)
    for at, _ in enumerate(stream):
        if at == 10:
            rig.drain(0)
            assert moving.wait(HANGS_S)
            stream.close()
            break
    for each in rig.replicas:
        until(lambda each=each: each.live.numbers().under_way == 0 and each.live.numbers().free_blocks == 64)  # type: ignore[misc]


def test_nobody_moves_anything_without_the_key(rig: Rig) -> None:
    import urllib.error
    import urllib.request

    for path, key in (("costs", None), ("costs", "wrong"), ("requests/chatcmpl-1/part", "sesame")):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{rig.urls[0]}/isthmus/moves/{path}", headers=headers))
        assert refused.value.code == (404 if key == "sesame" else 401)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not a request that is moved"),
        (b"\xff" * 64, "not a request that is moved"),
        (pack({"model": "another"}), "another model or number type"),
        (pack({}, (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))), "another model or number type"),
        (pack({})[:9] + b"rest", "not a request that is moved"),
    ],
)
def test_what_is_no_request_does_not_arrive(folder: Path, body: bytes, said: str) -> None:
    moves = open_generation(GenerationSettings(folder)).moves
    with pytest.raises(InvalidInput, match=said):
        asyncio.run(moves.arrive("handle", body))


STATE: Any = {
    "prompt": [5, 6],
    "tokens": [7],
    "first": 0,
    "sampling": [0.0, 1.0, 3],
    "stops": [],
    "waited_s": 1.0,
    "first_token_after_s": 0.5,
    "latency_s": None,
    "max_tokens": 9,
    "user": "",
    "kind": "",
    "ttft_s": None,
    "tpot_s": None,
    "utility": 1.0,
    "salt": "",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"waited_s": float("nan")}, "ValueError"),
        ({"first_token_after_s": float("inf")}, "ValueError"),
        ({"tokens": [320]}, "ValueError"),
        ({"prompt": [-1]}, "ValueError"),
        ({"tokens": [float("inf")]}, "OverflowError"),
        ({"sampling": [0.0, 1.0, 1 << 80]}, "ValueError"),
        ({"max_tokens": 8.5}, "ValueError"),
        ({"max_tokens": 1}, "it has ended"),
        ({"salt": ["a list"]}, "TypeError"),
        ({"computed": 3}, "it has ended"),  # its last token was not computed, or there would be a further one
        ({"salt": None}, "TypeError"),
    ],
)
def test_what_would_fail_the_steps_of_others_does_not_arrive(folder: Path, changes: Any, said: str) -> None:
    moves = open_generation(GenerationSettings(folder)).moves
    kept = (torch.zeros(3, 2, 3, 4), torch.zeros(3, 2, 3, 4))
    body = pack({**STATE, "model": moves.model, **changes}, kept if "computed" in changes else None)
    with pytest.raises(InvalidInput, match=said):
        asyncio.run(moves.arrive("handle", body))


def test_a_request_does_not_go_on_with_other_weights_of_the_same_form(folder: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "other", seed=1, eos_token_id=[])
    ours, others = (open_generation(GenerationSettings(each)).moves for each in (folder, tmp_path / "other"))
    assert ours.model == open_generation(GenerationSettings(folder)).moves.model != others.model
    with pytest.raises(InvalidInput, match="another model"):
        asyncio.run(others.arrive("handle", pack({**STATE, "model": ours.model})))


def test_what_arrives_holds_no_more_than_the_cache(folder: Path) -> None:
    moves = open_generation(GenerationSettings(folder, kv_tokens=64)).moves
    part = pack({}, (torch.zeros(3, 2, 40, 4), torch.zeros(3, 2, 40, 4)))

    async def scenario() -> None:
        await moves.keep_part("first", part)
        with pytest.raises(InvalidInput, match="do not fit here; try again later"):
            await moves.keep_part("second", part)

    asyncio.run(scenario())


def test_who_lost_the_place_during_a_move_is_told_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The front then asks another replica, at once."""

    async def full(self: Moves, handle: str, body: bytes) -> Any:
        raise InvalidInput("no room")

    def adopt(life: Any, now_s: float) -> Any:
        raise ValueError("others have come")

    expected = whole(rig)
    monkeypatch.setattr(Moves, "arrive", full)
    monkeypatch.setattr(rig.replicas[0].live.engine, "adopt", adopt)
    assert rig.stream(lambda at: rig.drain(0) if at == 20 else None) == expected
    source = rig.replicas[0].live.numbers()
    assert source.outcomes[Outcome.FAILED] == 1 and source.under_way == 0
    assert rig.replicas[1].live.numbers().outcomes[Outcome.FINISHED] == 2


def test_a_replica_that_says_nonsense_of_its_costs_moves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nonsense(self: Upstream, method: str, path: str, body: bytes | None = None) -> bytes:
        return b"not JSON"

    expected = whole(rig)
    monkeypatch.setattr(Upstream, "_moved", nonsense)
    assert rig.stream(lambda at: rig.drain(0) if at == 20 else None) == expected
    assert rig.relay.numbers().moves == {"failed": 1}


def test_keys_and_values_come_out_as_they_went_in() -> None:
    shape = KVShape(2, 3, 4, torch.bfloat16)
    kept = tuple(torch.randn(2, 3, 7, 4).to(torch.bfloat16) for _ in range(2))
    state, found = unpack(pack({"tokens": 7}, kept), shape)  # type: ignore[arg-type]
    assert state == {"tokens": 7} and found is not None
    assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))
    with pytest.raises(InvalidInput, match="number type"):
        unpack(pack({}, kept), KVShape(2, 3, 4, torch.float32))  # type: ignore[arg-type]
