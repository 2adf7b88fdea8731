"""Two servers of llama.cpp as replicas, the official openai client in front, and one of them killed in mid-answer.

Needs ISTHMUS_GGUF, a small model's GGUF file, and ISTHMUS_LLAMA_PYTHON, an interpreter with the package xllamacpp.
"""

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.rigs.generation.replicas import serving_relay
from tests.rigs.project.patience import until

SERVER = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = 0
params.n_ctx, params.n_parallel, params.warmup = 1024, 2, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
MESSAGES: Any = [{"role": "user", "content": "Count from one to twenty in words."}]
GREEDY: Any = {"model": "words", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    model, python = (os.environ.get(name) for name in ("ISTHMUS_GGUF", "ISTHMUS_LLAMA_PYTHON"))
    if not model or not python:
        pytest.skip("set ISTHMUS_GGUF to a small model and ISTHMUS_LLAMA_PYTHON to a Python with xllamacpp")
    command = [python, "-c", SERVER, model]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(2)]
    try:
        found = []
        for process in started:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            found.append((process, address if address.startswith("http") else f"http://{address}"))
        yield found
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_real_server_is_a_replica_and_may_be_killed(replicas: list[tuple[subprocess.Popen[str], str]]) -> None:
    with (
        serving_relay([url for _, url in replicas], rows=2) as (relay, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client,
        openai.OpenAI(base_url=f"{replicas[1][1]}/v1", api_key="none", max_retries=0, timeout=300) as direct,
    ):
        theirs = direct.models.list().data[0].id
        whole = direct.chat.completions.create(**{**GREEDY, "model": theirs}).choices[0].message.content
        done = client.chat.completions.create(**GREEDY)
        assert done.choices[0].message.content == whole
        assert done.usage is not None and done.usage.completion_tokens > 10
        feels = {"emotion": {"class": "SAD", "probability": 0.9}}
        sad = client.chat.completions.create(**GREEDY, extra_body=feels)
        # The model's template has a system turn of its own, which the sentence takes the place of.
        assert sad.usage is not None and sad.usage.prompt_tokens != done.usage.prompt_tokens
        assert sad.choices[0].message.content != whole
        with pytest.raises(openai.BadRequestError, match="colour"):
            client.chat.completions.create(**GREEDY, extra_body={"colour": "red"})

        pieces = []
        for at, chunk in enumerate(client.chat.completions.create(**GREEDY, stream=True)):
            pieces.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
            if at == 4:
                replicas[0][0].kill()
        assert "".join(pieces) == whole
        until(lambda: [each.ready for each in relay.standings()] == [False, True])
        assert client.chat.completions.create(**GREEDY).choices[0].message.content == whole
