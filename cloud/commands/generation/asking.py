"""The work of ``isthmus generate ask``: a client of OpenAI's interface, from the standard library alone."""

import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from isthmus.cloud.commands.generation.options import AskOptions
from isthmus.command_line import fail, key_in

_MAX_LINE_BYTES = 1 << 20
_TIMEOUT_S = 120.0


def ask(asked: AskOptions) -> None:
    """Print the answer piece by piece. Ends the command with one line if the server refuses or cannot be reached."""
    if not asked.server.startswith(("http://", "https://")):
        raise ValueError(f"--server: {asked.server!r} must begin with http:// or https://")
    messages = [{"role": "user", "content": asked.prompt}]
    if asked.system is not None:
        messages.insert(0, {"role": "system", "content": asked.system})
    body: dict[str, Any] = {
        "model": _only_model(asked),
        "messages": messages,
        "max_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    optional = {"seed": asked.seed, "stop": asked.stop or None, "latency_s": asked.latency_s}
    body |= {name: value for name, value in optional.items() if value is not None}
    usage: dict[str, Any] = {}
    times: dict[str, Any] = {}
    with _opened(asked, "/v1/chat/completions", body) as response:
        for event in _events(response):
            if "error" in event:
                fail(str(event["error"].get("message")))
            for choice in event.get("choices", []):
                sys.stdout.write(choice.get("delta", {}).get("content") or "")
                sys.stdout.flush()
            usage = event.get("usage") or usage
            times = event.get("isthmus") or times
    sys.stdout.write("\n")
    if usage:
        line = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
        if times:
            line += f"; first token after {times['ttft_s']:.2f} s, whole answer after {times['total_s']:.2f} s"
        print(line, file=sys.stderr)


def _only_model(asked: AskOptions) -> str:
    with _opened(asked, "/v1/models", None) as response:
        found = json.loads(response.read(_MAX_LINE_BYTES)).get("data", [])
    if len(found) != 1:
        fail(f"{asked.server} serves {len(found)} models, and this command asks a server of one")
    return str(found[0]["id"])


def _opened(asked: AskOptions, path: str, body: dict[str, Any] | None) -> Any:
    request = urllib.request.Request(
        asked.server.rstrip("/") + path, None if body is None else json.dumps(body).encode()
    )
    request.add_header("Content-Type", "application/json")
    key = key_in(asked.key_file)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    context = None
    if asked.server.startswith("https://"):
        context = ssl.create_default_context(cafile=None if asked.tls_cert is None else str(asked.tls_cert))
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context)
    except urllib.error.HTTPError as error:
        fail(_refusal(error))
    except urllib.error.URLError as error:
        fail(f"{asked.server} cannot be reached: {error.reason}")


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(_MAX_LINE_BYTES))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {error.code}"


def _events(response: Any) -> Iterator[dict[str, Any]]:
    while line := response.readline(_MAX_LINE_BYTES):
        data = line.decode().strip()
        if data == "data: [DONE]":
            return
        if data.startswith("data: "):
            yield json.loads(data.removeprefix("data: "))
