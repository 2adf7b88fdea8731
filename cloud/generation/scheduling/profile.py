"""PURE: what a step of the model costs on one machine, as five coefficients, and its JSON form.

A step's time is affine in what it does: a fixed part (the weights are read once), a part per row that decodes, per
token of context that is read, per prompt token, and per pair of query and key in prefill.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Final

from isthmus.cloud.elastic.scheduling.profile import MachineKey

FORMAT: Final = 1
MAX_PROFILE_CHARS: Final = 1 << 20


class BadProfile(ValueError):
    """The text is not a profile of generation, or its numbers are impossible."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one step computes. ``pairs``: for each prompt token, the tokens that it attends to, itself included."""

    decode_rows: int = 0
    context_tokens: int = 0
    prompt_tokens: int = 0
    pairs: int = 0

    @staticmethod
    def of(spans: Iterable[tuple[int, int]]) -> "Load":
        """Returns the load of spans (first position, number of tokens). One token after others is a decode.

        >>> Load.of([(10, 1), (0, 3)])
        Load(decode_rows=1, context_tokens=11, prompt_tokens=3, pairs=6)
        """
        rows = context = prompt = pairs = 0
        for first, count in spans:
            if count == 1 and first:
                rows += 1
                context += first + 1
            else:
                prompt += count
                pairs += count * first + count * (count + 1) // 2
        return Load(rows, context, prompt, pairs)

    @staticmethod
    def padded(spans: Sequence[tuple[int, int]], dead_rows: int = 0) -> "Load":
        """Returns the load of a step whose rows are padded to the longest, with ``dead_rows`` that nobody needs."""
        decodes = [first + 1 for first, count in spans if count == 1 and first]
        chunks = [first + count for first, count in spans if count > 1 or not first]
        rows, longest = len(decodes) + dead_rows, max(chunks, default=0)
        return Load(
            rows, rows * max(decodes, default=0), len(chunks) * longest, len(chunks) * longest * (longest + 1) // 2
        )


@dataclass(frozen=True)
class GenerationProfile:
    """Seconds per step, decode row, context token, prompt token and pair; and bytes of KV cache per token.

    ``error`` is the mean relative error of the fit on the measured grid. Raises BadProfile for numbers that are
    negative or not finite, or a step that costs nothing.

    >>> profile = reference_profile()
    >>> round(1e3 * profile.step_s(Load(decode_rows=16, context_tokens=16 * 128)), 1)
    63.0
    >>> GenerationProfile.from_json(profile.to_json()) == profile
    True
    """

    key: MachineKey
    step_fixed_s: float
    row_s: float
    context_s: float
    prompt_s: float
    pair_s: float
    kv_bytes_per_token: int
    error: float = 0.0
    grid: tuple[tuple[int, int, int, int, float], ...] = field(default=(), repr=False)
    """The measured steps: the four numbers of their load, and their seconds."""

    def __post_init__(self) -> None:
        costs = (self.step_fixed_s, self.row_s, self.context_s, self.prompt_s, self.pair_s)
        if not all(math.isfinite(cost) and cost >= 0 for cost in (*costs, self.error)):
            raise BadProfile("costs must be finite and not negative")
        if self.step_fixed_s <= 0 or self.prompt_s <= 0 or self.kv_bytes_per_token < 1:
            raise BadProfile("a step, a prompt token and a token's KV cache must cost something")

    def step_s(self, load: Load) -> float:
        """Returns the seconds that a step of this load takes."""
        return (
            self.step_fixed_s
            + self.row_s * load.decode_rows
            + self.context_s * load.context_tokens
            + self.prompt_s * load.prompt_tokens
            + self.pair_s * load.pairs
        )

    def alone_s(self, prompt: int, tokens: int) -> float:
        """Returns the seconds of a request that runs alone: its prompt in one step, then one step per token."""
        steps = max(0, tokens - 1)
        context = steps * (prompt + 1) + steps * (steps - 1) // 2
        first_s = self.step_s(Load(prompt_tokens=prompt, pairs=prompt * (prompt + 1) // 2))
        return first_s + steps * (self.step_fixed_s + self.row_s) + self.context_s * context

    def first_token_s(self, prompt: int) -> float:
        """Returns the seconds until the first token of a request that runs alone."""
        return self.alone_s(prompt, 1)

    def work_s(self, prompt: int, tokens: int, rows: int) -> float:
        """Returns a request's share of the machine's time if steps are shared by ``rows`` rows."""
        return self.alone_s(prompt, tokens) - self.step_fixed_s * (1 - 1 / rows) * max(1, tokens)

    def tokens_per_s(self, rows: int, context: int) -> float:
        """Returns tokens per second while ``rows`` rows of ``context`` tokens each decode."""
        return rows / self.step_s(Load(decode_rows=rows, context_tokens=rows * context))

    def slowed(self, factor: float) -> "GenerationProfile":
        """Returns a profile in which every step takes ``factor`` times as long."""
        costs = ("step_fixed_s", "row_s", "context_s", "prompt_s", "pair_s")
        return replace(self, **{name: factor * getattr(self, name) for name in costs})

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "kind": "generation", **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> "GenerationProfile":
        """Reads what ``to_json`` wrote. Raises BadProfile for other text, another format, or impossible numbers."""
        if len(text) > MAX_PROFILE_CHARS:
            raise BadProfile(f"the profile has over {MAX_PROFILE_CHARS} characters")
        try:
            raw = json.loads(text)
            if raw.pop("kind", None) != "generation" or raw.pop("format") != FORMAT:
                raise BadProfile(
                    f"not a profile of generation of format {FORMAT}; 'isthmus generate profile' makes one"
                )
            key = MachineKey(**{item.name: raw["key"][item.name] for item in fields(MachineKey)})
            grid = tuple((int(a), int(b), int(c), int(d), float(e)) for a, b, c, d, e in raw["grid"])
            costs = {
                name: float(raw[name]) for name in ("step_fixed_s", "row_s", "context_s", "prompt_s", "pair_s", "error")
            }
            return GenerationProfile(key=key, kv_bytes_per_token=int(raw["kv_bytes_per_token"]), grid=grid, **costs)
        except BadProfile:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadProfile(f"not a profile of generation: {error!r}") from error


def reference_profile() -> GenerationProfile:
    """Returns measured costs of a model of 135 million parameters: one thread, bfloat16, a Xeon with AMX.

    Simulations use it if no profile is named, so that their figures can be compared between machines.
    """
    return GenerationProfile(
        key=MachineKey("Xeon with AMX", "cpu", 1, "bfloat16", "135M"),
        step_fixed_s=0.034,
        row_s=0.0012,
        context_s=4.8e-6,
        prompt_s=0.42e-3,
        pair_s=0.4e-6,
        kv_bytes_per_token=23_040,
    )
