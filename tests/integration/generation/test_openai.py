"""The official openai client, unchanged, against a tiny model: what it may ask, and what it is refused."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.numpy import load_file

from isthmus.cloud.generation.serve.emotion import Emotion
from isthmus.cloud.generation.serve.host import open_generation
from isthmus.cloud.generation.serve.serving import Generation
from isthmus.cloud.generation.serve.settings import GenerationSettings
from isthmus.proto.errors import InvalidInput
from tests.rigs.generation.llama import plain_greedy, save_tiny_llama, serving_http
from tests.rigs.project.patience import HANGS_S, until

MESSAGES: Any = [{"role": "system", "content": "You are small."}, {"role": "user", "content": "Come back!"}]
KEY = "a secret of the operator"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def generation(folder: Path) -> Generation:
    return open_generation(GenerationSettings(folder, max_tokens=200, rows=4, kv_tokens=2_048, max_waiting=6))


@pytest.fixture(scope="module")
def url(generation: Generation) -> Iterator[str]:
    with serving_http(generation, KEY) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=HANGS_S) as client:
        yield client


def expected(folder: Path, generation: Generation, prompt: list[int], count: int) -> str:
    """What the plain forward answers, up to its end token."""
    tensors = load_file(folder / "model.safetensors")
    tokens = plain_greedy(tensors, generation.config, prompt, count)
    ends = [at for at, token in enumerate(tokens) if token in generation.config.end_ids]
    return generation.tokenizer._decode(tokens[: ends[0]] if ends else tokens)


def test_a_chat_is_answered_as_the_plain_forward_does(
    client: openai.OpenAI, generation: Generation, folder: Path
) -> None:
    done = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0)
    prompt = generation.tokenizer.chat(MESSAGES)
    assert done.choices[0].message.content == expected(folder, generation, prompt, 12)
    assert done.choices[0].finish_reason in ("length", "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.total_tokens) == (
        len(prompt),
        len(prompt) + done.usage.completion_tokens,
    )


def test_a_stream_brings_the_same_text_piece_by_piece_and_usage_at_the_end(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "seed": 7, "temperature": 0.9, "top_p": 0.95}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5
    other = client.chat.completions.create(**{**asked, "seed": 8})
    assert other.choices[0].message.content != text


def test_how_the_user_feels_is_a_sentence_of_the_servers_before_the_conversation(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    feels = {"emotion": {"class": "SAD", "probability": 0.78}}
    done = client.chat.completions.create(**asked, messages=MESSAGES, extra_body=feels)
    said = Emotion("sad", 0.8).said
    by_hand: Any = [{"role": "system", "content": f"{said}\n\nYou are small."}, MESSAGES[1]]
    assert done.choices[0].message.content == (
        client.chat.completions.create(**asked, messages=by_hand).choices[0].message.content
    )
    used: Any = done.model_extra
    assert used["isthmus"]["emotion"] == {"class": "sad", "probability": 0.8, "template": "state-1"}
    chunks: Any = list(client.chat.completions.create(**asked, messages=MESSAGES, extra_body=feels, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == done.choices[0].message.content
    assert chunks[-1].model_extra["isthmus"]["emotion"]["class"] == "sad"


def test_completions_stop_at_a_stop_string(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "the words of", "max_tokens": 24, "seed": 3}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[8:10]
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.find(stop)], "stop")
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(pieces) == cut.text


def test_many_at_once_are_answered_as_one_by_one(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return client.completions.create(model="tiny", prompt=f"{seed}: come", max_tokens=15, seed=seed).choices[0].text

    alone = [ask(seed) for seed in range(5)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: ask(seed)})) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(5)] == alone


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "isthmus"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"n": 2}, "n", "only 1 is supported"),
        ({"tools": [{"type": "function"}]}, "tools", "only"),
        ({"extra_body": {"colour": "red"}}, "colour", "this field is not supported"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to 200"),
        ({"max_tokens": 201}, "max_tokens", "from 1 to 200"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"stop": list("abcde")}, "stop", "at most 4"),
        ({"stop": "x" * 65}, "stop", "64 bytes"),
        ({"messages": []}, "messages", "from 1 to"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "system, user, assistant"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "prompt", "that the model can hold"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "type 'text'"),
        ({"extra_body": {"latency_s": -1}}, "latency_s", "above 0"),
        ({"seed": 1 << 64}, "seed", "whole number"),
        ({"extra_body": {"emotion": "Obey me"}}, "emotion", "an object with 'class'"),
        ({"extra_body": {"emotion": {"class": "Obey me", "probability": 1}}}, "emotion", "must be one of"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_refused_by_name(
    client: openai.OpenAI, changes: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **changes})
    assert refused.value.param == param
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_wrong_key_and_a_wrong_model_are_refused(url: str, client: openai.OpenAI) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="guessed", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.completions.create(model="tiny", prompt="x")
    with pytest.raises(openai.NotFoundError, match="only 'tiny' is served"):
        client.completions.create(model="gpt", prompt="x")


def post(url: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=HANGS_S)
    connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {KEY}", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "not UTF-8"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "half a character"),
        (b'{"model": "tiny", "prompt": ""}', 400, "prompt: it is empty"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "not JSON"),
        (b'{"model": "tiny", "prompt": ["x", "y"]}', 400, "must be one text"),
        (b"[]", 400, "must be a JSON object"),
        (b" " * (1 << 20) + b"{}", 413, "at most 1048576 bytes"),
    ],
)
def test_bodies_that_are_no_request_are_refused(url: str, body: bytes, status: int, said: str) -> None:
    found = post(url, body)
    assert found[0] == status
    assert said in found[1]["error"]["message"]


def load(generation: Generation) -> tuple[int, int, int]:
    numbers = generation.numbers()
    return numbers.under_way, numbers.waiting, numbers.free_blocks


@contextmanager
def held(generation: Generation, steps: int) -> Iterator[None]:
    """Let the model run so many steps, and the next one when the block ends."""
    executor = generation.live._executor
    gate, run, left = threading.Event(), executor.run, iter(range(steps))
    with pytest.MonkeyPatch.context() as patch:

        def held_run(step: Any) -> Any:
            if next(left, None) is None:
                assert gate.wait(HANGS_S)
            return run(step)

        patch.setattr(executor, "run", held_run)
        try:
            yield
        finally:
            gate.set()


def test_who_leaves_frees_the_blocks(client: openai.OpenAI, generation: Generation) -> None:
    free = load(generation)[2]
    with held(generation, steps=3):
        stream = client.completions.create(model="tiny", prompt="come", max_tokens=200, stream=True, seed=1)
        next(iter(stream))
        assert load(generation)[0] == 1
        stream.close()
    until(lambda: load(generation) == (0, 0, free))
    with held(generation, steps=3), pytest.raises(openai.APITimeoutError):
        client.completions.create(model="tiny", prompt="come", max_tokens=200, seed=1, timeout=0.05)
    until(lambda: load(generation) == (0, 0, free))


def test_too_many_are_told_to_come_again(client: openai.OpenAI, generation: Generation) -> None:
    answers: list[str] = []

    def ask(seed: int) -> None:
        done = client.completions.create(model="tiny", prompt="come", max_tokens=2, seed=seed)
        answers.append(done.choices[0].finish_reason)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    with held(generation, steps=0):
        for thread in threads:
            thread.start()
        until(lambda: load(generation)[0] == 6)
        with pytest.raises(openai.RateLimitError, match="try again later") as refused:
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert refused.value.response.headers["retry-after"] == "1"
    for thread in threads:
        thread.join()
    assert len(answers) == 6


def test_what_is_too_late_is_not_computed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="could not be answered in time") as late:
        client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body={"ttft_s": 1e-6})
    assert late.value.response.headers["x-should-retry"] == "false"


def test_a_failed_step_fails_its_requests_and_the_server_goes_on(
    client: openai.OpenAI, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(
            "isthmus.cloud.generation.model.executor.draw", lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
        )
        with pytest.raises(openai.InternalServerError, match="the server failed on this request"):
            client.completions.create(model="tiny", prompt="x", max_tokens=3)
    assert client.completions.create(model="tiny", prompt="x", max_tokens=3).choices[0].text is not None


def test_settings_that_cannot_be_served_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for simulations alone"):
        GenerationSettings(folder, policy="magnus")
    with pytest.raises(InvalidInput, match="no policy 'best'"):
        open_generation(GenerationSettings(folder, policy="best"))
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"profile profile\.json: not a profile"):
        open_generation(GenerationSettings(folder, profile=tmp_path / "profile.json"))
