"""PURE: requests for text, what a client may ask for, and how a request can end. Times are in seconds of one clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from isthmus.proto.errors import InvalidInput

MAX_STOPS: Final = 4
MAX_STOP_BYTES: Final = 64
MAX_TEMPERATURE: Final = 2.0
MAX_SECONDS: Final = 3_600.0
MAX_UTILITY: Final = 1e6


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: greedily at temperature 0, else by ``seed`` and position (``model/sampler.py``).

    Raises InvalidInput for values that are not finite or out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise InvalidInput(f"temperature: must be from 0 to {MAX_TEMPERATURE:g}")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("top_p: must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and what its answer may cost and when it should be there.

    ``ttft_s`` is the time to the first token that is asked for, ``tpot_s`` the time per further token, and
    ``deadline_s`` the time of the clock at which the whole answer should be there. Each may be None: no such wish.
    ``user`` is whom fair policies account it to; ``kind`` is its class, by which lengths are predicted.

    Requests of one ``salt`` share what they compute for prompts that begin alike. A client that guesses another's
    prompt could see by the time to the first token that it was right; so whom that concerns gives a salt of their own.

    :meth:`asked` makes a request from a client's values and checks them.
    """

    id: int
    prompt: Sequence[int] = field(repr=False)
    max_tokens: int
    arrival_s: float
    user: str = ""
    kind: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    utility: float = 1.0
    salt: str = ""

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens that prompt and answer can have together."""
        return len(self.prompt) + self.max_tokens

    def is_in_time(self, first_token_s: float, end_s: float, tokens: int) -> bool:
        """Returns whether an answer of so many tokens keeps all of the request's wishes."""
        if self.deadline_s is not None and end_s > self.deadline_s:
            return False
        if self.ttft_s is not None and first_token_s - self.arrival_s > self.ttft_s:
            return False
        return self.tpot_s is None or tokens < 2 or (end_s - first_token_s) / (tokens - 1) <= self.tpot_s

    @staticmethod
    def asked(
        id: int,
        prompt: Sequence[int],
        *,
        arrival_s: float,
        max_tokens: int,
        context: int,
        limit: int,
        sampling: Sampling,
        user: str = "",
        kind: str = "",
        stops: Sequence[str] = (),
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        latency_s: float | None = None,
        utility: float = 1.0,
        salt: str = "",
    ) -> "Request":
        """Makes a request of a client's values; ``latency_s`` after its arrival is its deadline.

        ``context`` is the model's largest number of tokens, ``limit`` the largest ``max_tokens`` that is served.
        Raises InvalidInput, which names the value, for an empty or over-long prompt, ``max_tokens`` outside
        1 to ``limit``, stop strings beyond the bounds, and times or a utility out of range.
        """
        if not prompt:
            raise InvalidInput("prompt: it is empty")
        if not 1 <= max_tokens <= limit:
            raise InvalidInput(f"max_tokens: must be from 1 to {limit}")
        if len(prompt) + max_tokens > context:
            raise InvalidInput(
                f"prompt: {len(prompt)} tokens and max_tokens {max_tokens} are more than the {context} that the model "
                "can hold; shorten the prompt or ask for fewer tokens"
            )
        if len(stops) > MAX_STOPS:
            raise InvalidInput(f"stop: at most {MAX_STOPS} strings")
        for stop in stops:
            if not 1 <= len(stop.encode(errors="replace")) <= MAX_STOP_BYTES:
                raise InvalidInput(f"stop: each string must have from 1 to {MAX_STOP_BYTES} bytes")
        for name, seconds in (("ttft_s", ttft_s), ("tpot_s", tpot_s), ("latency_s", latency_s)):
            if seconds is not None and not 0 < seconds <= MAX_SECONDS:
                raise InvalidInput(f"{name}: must be above 0 and at most {MAX_SECONDS:g} s")
        if not 0 <= utility <= MAX_UTILITY:
            raise InvalidInput(f"utility: must be from 0 to {MAX_UTILITY:g}")
        return Request(
            id=id,
            prompt=prompt,
            max_tokens=max_tokens,
            arrival_s=arrival_s,
            user=user,
            kind=kind,
            sampling=sampling,
            stops=tuple(stops),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            deadline_s=None if latency_s is None else arrival_s + latency_s,
            utility=utility,
            salt=salt,
        )


class Outcome(Enum):
    """How a request ended. Each accepted request ends exactly once; a refused one has no outcome."""

    FINISHED = "finished"
    """Its answer is whole: it ended by itself, by a stop string or at ``max_tokens``."""
    CACHED = "cached"
    """An answer that was kept was given again; no step ran for it."""
    EVICTED = "evicted"
    """Given up before its first token, because it could no longer be in time."""
    CUT = "cut"
    """Given up by the policy after its first token. The tokens it has stand."""
    CANCELLED = "cancelled"
    """Its caller left."""
    FAILED = "failed"
    """A step that it took part in failed."""
