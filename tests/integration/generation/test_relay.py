"""Other servers as replicas, the official openai client in front: same answers, failures hidden or told, drain."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from isthmus.cloud.commands.generation import serving
from isthmus.cloud.commands.generation.options import GenerateServeOptions
from isthmus.cloud.generation.scheduling.request import Sampling
from isthmus.cloud.generation.serve import relay as relay_module
from isthmus.cloud.generation.serve.carrier import Lost
from isthmus.cloud.generation.serve.emotion import Emotion
from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.live import Piece
from isthmus.cloud.generation.serve.serving import Wishes
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.cloud.generation.serve.upstream import Upstream
from isthmus.cloud.replicas.opening import opened
from isthmus.proto.errors import InvalidInput
from tests.rigs.generation.llama import save_tiny_llama, serving_http
from tests.rigs.generation.replicas import Script, redirecting, scripted, serving_relay
from tests.rigs.project.patience import HANGS_S, until

MESSAGES: Any = [{"role": "user", "content": "Come back!"}]
GREEDY: Any = {"model": "words", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANGS_S)


def streamed(client: openai.OpenAI, **asked: Any) -> str:
    return "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices
    )


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of our own with a tiny model."""
    folder = tmp_path_factory.mktemp("replica") / "tiny"
    save_tiny_llama(folder)
    with serving_http(open_generation(GenerationSettings(folder, max_tokens=200, rows=4, kv_tokens=2_048))) as url:
        yield url


def test_answers_are_those_of_the_replica_whole_and_streamed(replica: str) -> None:
    with serving_relay([replica]) as (_, url), client_of(url) as client, client_of(replica) as direct:
        asked = {**GREEDY, "temperature": 0.9, "seed": 7, "top_p": 0.9, "max_tokens": 20}
        there = direct.chat.completions.create(**{**asked, "model": "tiny"})
        here = client.chat.completions.create(**asked)
        assert here.choices[0].message.content == there.choices[0].message.content
        assert here.usage == there.usage and here.model == "words"
        assert streamed(client, **asked) == there.choices[0].message.content
        prompted: Any = {"prompt": "the words", "max_tokens": 16, "seed": 3}
        text = direct.completions.create(model="tiny", **prompted).choices[0].text
        assert client.completions.create(model="words", **prompted).choices[0].text == text
        cut = client.completions.create(model="words", **prompted, stop=text[4:6])
        assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.find(text[4:6])], "stop")
        with pytest.raises(openai.BadRequestError, match="not supported"):
            client.chat.completions.create(**GREEDY, extra_body={"colour": "red"})
        assert [model.id for model in client.models.list()] == ["words"]


def test_how_the_user_feels_is_said_to_any_server() -> None:
    script = Script(pieces=["Oh."])
    with scripted(script) as theirs, serving_relay([theirs]) as (_, url), client_of(url) as client:
        feels = {"emotion": {"class": "SAD", "probability": 0.9}}
        done: Any = client.chat.completions.create(**GREEDY, extra_body=feels)
        assert done.choices[0].message.content == "Oh." and done.usage.completion_tokens == 7
        assert done.model_extra["isthmus"]["emotion"]["template"] == "state-1"
    (seen,) = script.seen
    assert seen["messages"] == [{"role": "system", "content": Emotion("sad", 0.9).said}, *MESSAGES]
    assert "emotion" not in seen and seen["model"] == "theirs" and seen["stream"] is True


def test_a_replica_killed_between_send_and_commit_is_replaced_and_no_text_comes_twice(replica: str) -> None:
    with client_of(replica) as direct:
        whole = direct.chat.completions.create(**{**GREEDY, "model": "tiny"}).choices[0].message.content
    assert whole is not None and len(whole) > 6
    killed = Script(pieces=[whole[:2], whole[2:5], "never sent"], breaks_after=2)
    with scripted(killed) as first, serving_relay([first, replica]) as (_, url), client_of(url) as client:
        assert streamed(client, **GREEDY) == whole
        assert len(killed.seen) == 1
        assert client.chat.completions.create(**GREEDY).choices[0].message.content == whole, "and it is left alone then"
        assert len(killed.seen) == 1


def test_a_replica_that_goes_on_differently_is_told_to_the_client() -> None:
    killed = Script(pieces=["One ", "two"], breaks_after=1)
    other = Script(pieces=["Uno", " dos"])
    with ExitStack() as stack:
        urls = [stack.enter_context(scripted(each)) for each in (killed, other)]
        _, url = stack.enter_context(serving_relay(urls))
        client = stack.enter_context(client_of(url))
        with pytest.raises(openai.APIError, match="after 4 characters, and another one goes on differently"):
            streamed(client, **GREEDY)


@pytest.mark.parametrize("clock", [lambda: 0.0, time.monotonic], ids=["no tries", "tries"])
def test_a_stream_that_lost_its_replica_is_refused_if_no_other_takes_it(
    clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "PATIENCE_S", 2.0)
    killed, full = Script(pieces=["One ", "two"], breaks_after=1), Script(status=503)
    with ExitStack() as stack:
        urls = [stack.enter_context(scripted(each)) for each in (killed, full)]
        relay, url = stack.enter_context(serving_relay(urls, clock=clock))
        client = stack.enter_context(client_of(url))
        killed.then = full
        with pytest.raises(openai.APIError, match="no replica is free or reachable"):
            streamed(client, **GREEDY)
        assert full.seen and relay.numbers().under_way == 0


@pytest.mark.parametrize(
    "broken",
    [
        Script(status=500),
        Script(status=429),
        Script(raw=b"<html>"),
        Script(raw=b"data: [1]\n\n"),
        Script(raw=b'data: {"choices": 3}\n\ndata: [DONE]\n\n'),
        Script(raw=b'data: {"error": {"message": "out of memory"}}\n\n'),
    ],
    ids=["500", "429", "no stream", "no object", "no choices", "error"],
)
def test_a_broken_or_full_replica_is_passed_over(broken: Script) -> None:
    sound = Script(pieces=["Well."])
    with ExitStack() as stack:
        urls = [stack.enter_context(scripted(each)) for each in (broken, sound)]
        _, url = stack.enter_context(serving_relay(urls))
        client = stack.enter_context(client_of(url))
        for _ in range(2):
            assert client.chat.completions.create(**GREEDY).choices[0].message.content == "Well."
    assert len(broken.seen) == 1 and len(sound.seen) == 2


def test_what_the_replica_refuses_is_refused_with_its_words() -> None:
    script = Script(status=400)
    with (
        scripted(script) as theirs,
        serving_relay([theirs]) as (_, url),
        client_of(url) as client,
        pytest.raises(openai.BadRequestError, match="the replica refuses the request: no room"),
    ):
        client.chat.completions.create(**GREEDY)
    assert len(script.seen) == 1


def test_without_a_replica_a_request_with_a_deadline_is_refused_in_time() -> None:
    with serving_relay(["http://127.0.0.1:9"]) as (relay, url), client_of(url) as client:
        assert not relay.ready
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(**GREEDY, extra_body={"latency_s": 0.2})
        assert refused.value.status_code == 504


def test_a_drained_replica_gets_nothing_new_and_what_it_has_begun_ends_there() -> None:
    hold = threading.Event()
    first, second = Script(pieces=["first", "."], hold=hold), Script(pieces=["second."])
    with ExitStack() as stack:
        urls = [stack.enter_context(scripted(each)) for each in (first, second)]
        relay, url = stack.enter_context(serving_relay(urls))
        client = stack.enter_context(client_of(url))
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(streamed(client, **GREEDY)))
        thread.start()
        until(lambda: bool(first.seen))
        relay.drain(urls[0])
        for _ in range(2):
            assert client.chat.completions.create(**GREEDY).choices[0].message.content == "second."
        hold.set()
        thread.join()
        assert texts == ["first."]
        relay.drain(urls[0], draining=False)
        assert client.chat.completions.create(**GREEDY).choices[0].message.content == "first."


def test_more_than_may_wait_are_refused_and_the_others_are_answered() -> None:
    hold = threading.Event()
    with (
        scripted(Script(pieces=["a", "b"], hold=hold)) as theirs,
        serving_relay([theirs], rows=1) as (relay, url),
        client_of(url) as client,
    ):
        streams = [threading.Thread(target=lambda: streamed(client, **GREEDY), daemon=True) for _ in range(8)]
        for thread in streams:
            thread.start()
        until(lambda: relay.numbers().under_way == 8)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**GREEDY)
        hold.set()
        for thread in streams:
            thread.join(timeout=HANGS_S)
        until(lambda: relay.numbers().under_way == 0)


def test_the_command_line_opens_a_relay_drains_by_file_and_keeps_answers(tmp_path: Path) -> None:
    script = Script(pieces=["Kept."])
    (tmp_path / "rules.json").write_text('{"faq": {"shared": true}}')
    wishes = Wishes(sampling=Sampling(temperature=0.0), kind="faq")

    async def run(urls: list[str], drained: str) -> list[str]:
        (tmp_path / "drained").write_text(drained)
        asked = GenerateServeOptions(
            upstream=urls, drained=tmp_path / "drained", cache=tmp_path / "rules.json", policy="vtc"
        )
        async with opened(asked) as found:
            texts = []
            for _ in range(2):
                async for item in await found.answering.chat(MESSAGES, wishes):
                    texts.append(item.text if isinstance(item, Piece) else item.outcome.value)
            return texts

    with scripted(script) as theirs:
        urls = [theirs, "http://127.0.0.1:9"]
        assert asyncio.run(run(urls, "http://127.0.0.1:9\n")) == ["Kept.", "finished", "Kept.", "cached"]
        assert len(script.seen) == 1
        with pytest.raises(ValueError, match="which is none of the upstream servers"):
            asyncio.run(run(urls, "http://127.0.0.1:10"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "either MODEL_DIR or --generate-upstream"),
        ({"model": Path("m"), "upstream": ["http://h"]}, "not both"),
        ({"upstream": ["http://h"], "cache_embedder": Path("e")}, "give the cache's rules, too"),
        ({"model": Path("m"), "drained": Path("d")}, "give upstream servers, or replicas"),
        ({"model": Path("m"), "upstream_model": "x"}, "but no upstream server"),
        ({"model": Path("m"), "replicas": 2}, "several replicas need --executor process, or ray"),
        ({"upstream": ["http://h"], "executor": "process"}, "replicas are of a model of ours"),
        ({"model": Path("m"), "executor": "fast"}, "none of thread, process, ray"),
        ({"model": Path("m"), "executor": "process", "move_key_file": Path("k")}, "without a key for moves"),
        ({"upstream": ["http://h"], "policy": "paced"}, "other servers do themselves"),
        ({"upstream": ["h"]}, "must be http://HOST:PORT"),
        ({"upstream": ["http://h"], "http": "0.0.0.0:0"}, "other machines"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_opened(
    asked: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.logs, "configure", lambda level: None)
    with pytest.raises((ValueError, InvalidInput), match=said):
        serving.serve(GenerateServeOptions(**asked))


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:8000", "http://key@host:1", "http://h/?q", "http://"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="upstream"):
        Upstream(url)


def test_no_text_follows_a_redirect_to_an_address_that_nobody_named() -> None:
    elsewhere = Script(pieces=["elsewhere."])
    with scripted(elsewhere) as theirs, redirecting(theirs) as one:

        async def scenario() -> None:
            upstream = Upstream(one, model="words", move_key="sesame")
            try:
                with pytest.raises(Lost, match="status 307"):
                    await anext(upstream.stream("/v1/completions", {"prompt": "what is it?"}))
                with pytest.raises(Lost, match="status 307"):
                    await upstream.keep_part("handle", b"keys and values")
            finally:
                await upstream.close()

        asyncio.run(scenario())
    assert not elsewhere.seen
