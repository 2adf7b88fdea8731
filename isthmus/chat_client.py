"""A client of OpenAI's chat interface from the standard library alone, for the commands that ask for a reply."""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.command_line import fail, key_in

_MAX_LINE_BYTES: Final = 1 << 20
_TIMEOUT_S: Final = 120.0


@dataclass
class ChatServer:
    """A server of one model at ``address`` (http:// or https://). ``usage`` and ``times`` are those of the last reply.

    Raises ValueError for another kind of address. Its methods end the command with one line if the server refuses or
    cannot be reached.
    """

    address: str
    key_file: Path | None = None
    tls_cert: Path | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)
    """The server's own field ``isthmus``: times, outcome, and what of the user's state was used. Empty for others."""

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise ValueError(f"--server: {self.address!r} must begin with http:// or https://")

    def reply(self, messages: Sequence[Mapping[str, str]], **wishes: Any) -> Iterator[str]:
        """Yields the reply to a conversation piece by piece. A wish that is None is not sent."""
        body: dict[str, Any] = {
            "model": self._only_model(),
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {name: value for name, value in wishes.items() if value is not None}
        with self._opened("/v1/chat/completions", body) as response:
            for event in _events(response):
                if "error" in event:
                    fail(str(event["error"].get("message")))
                for choice in event.get("choices", []):
                    yield choice.get("delta", {}).get("content") or ""
                self.usage = event.get("usage") or self.usage
                self.times = event.get("isthmus") or self.times

    def _only_model(self) -> str:
        with self._opened("/v1/models", None) as response:
            found = json.loads(response.read(_MAX_LINE_BYTES)).get("data", [])
        if len(found) != 1:
            fail(f"{self.address} serves {len(found)} models, and this command asks a server of one")
        return str(found[0]["id"])

    def _opened(self, path: str, body: dict[str, Any] | None) -> Any:
        request = urllib.request.Request(
            self.address.rstrip("/") + path, None if body is None else json.dumps(body).encode()
        )
        request.add_header("Content-Type", "application/json")
        key = key_in(self.key_file)
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        context = None
        if self.address.startswith("https://"):
            context = ssl.create_default_context(cafile=None if self.tls_cert is None else str(self.tls_cert))
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context)
        except urllib.error.HTTPError as error:
            fail(_refusal(error))
        except urllib.error.URLError as error:
            fail(f"{self.address} cannot be reached: {error.reason}. 'isthmus generate serve' starts a server")


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
