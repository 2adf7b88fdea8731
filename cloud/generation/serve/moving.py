"""A running request leaves this replica for another one, or arrives from one: its tokens, and its keys and values.

A move copies what is computed while the request goes on (``part``), then stops it between two steps and hands out the
rest (``leave``). It goes on where all of this arrives (``arrive``); if it arrives nowhere, it goes on here (``stay``).
A request that left and whose client goes away was moved: nothing of it remains here (Sun et al. 2024, "Llumnix",
sec. 4.2).

Text that the client has already is made again from the tokens, so the reader of both streams knows what is new.

Where we differ: a request that stays after all has its tokens computed again.

Axes: L layers, K key-value heads, P tokens, D values per head.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors.torch import load, save
from torch import Tensor

from isthmus.cloud.generation.model.kv import KVCache, KVShape
from isthmus.cloud.generation.scheduling.policy import Life
from isthmus.cloud.generation.scheduling.request import Request, Sampling
from isthmus.cloud.generation.serve.live import LiveGeneration, Reply
from isthmus.cloud.generation.serve.moved import MAX_STATE_BYTES, framed, unframed
from isthmus.cloud.generation.serve.text import AnswerText
from isthmus.proto.errors import InvalidInput, NotYours, Unavailable

log = logging.getLogger(__name__)

PARKED_S: Final = 10.0
"""A request that left and arrived nowhere goes on here after this time."""
PARTS_S: Final = 30.0
"""Keys and values of a request that does not arrive are forgotten after this time."""
_COPIED: Final = ("max_tokens", "user", "kind", "ttft_s", "tpot_s", "utility", "salt")

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Parked:
    life: Life
    reply: Reply


def pack(state: Mapping[str, Any], kept: KeysValues | None = None) -> bytes:
    """Returns a state, and keys and values as a safetensors file."""
    tensors = b"" if kept is None else save({"keys": kept[0].contiguous(), "values": kept[1].contiguous()})
    return framed(state, tensors)


def unpack(body: bytes | bytearray, shape: KVShape) -> tuple[dict[str, Any], KeysValues | None]:
    """Returns what ``pack`` was given. Raises InvalidInput for anything else, and for tensors of another model."""
    state, rest = unframed(body)
    if not rest:
        return state, None
    try:
        tensors = load(rest)
        keys, values = tensors["keys"], tensors["values"]
    except Exception as error:  # safetensors has errors of its own
        raise InvalidInput(f"not the keys and values of a request: {type(error).__name__}") from error
    tokens = keys.shape[2] if keys.dim() == 4 else -1
    for each in (keys, values):
        if tuple(each.shape) != (shape.layers, shape.kv_heads, tokens, shape.head_dim) or each.dtype != shape.dtype:
            raise InvalidInput("the keys and values are of another model or number type")
    return state, (keys, values)


class Moves:
    """The moves of one replica. ``text`` makes the decoder of an answer with these stop strings.

    Called from the event loop; what touches the engine and the cache runs on the engine's thread, between two steps.
    Megabytes are packed and unpacked on other threads, so neither steps nor other clients wait for that.
    ``model`` names the weights: requests arrive only from replicas of the same.
    """

    def __init__(
        self,
        live: LiveGeneration,
        cache: KVCache,
        shape: KVShape,
        text: Callable[[tuple[str, ...]], AnswerText],
        *,
        model: str,
        context: int,
        vocabulary: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.arrived = 0
        self.left = 0
        self._live, self._cache, self._shape, self._text = live, cache, shape, text
        self._context, self._vocabulary = context, vocabulary
        self._clock = clock
        self._names: dict[str, int] = {}
        self._parked: dict[str, _Parked] = {}
        self._parts: dict[str, KeysValues] = {}

    @property
    def most_bytes(self) -> int:
        """The largest body of a move: all keys and values of the longest request, and its state."""
        values = 2 * self._shape.layers * self._shape.kv_heads * self._shape.head_dim * self._shape.dtype.itemsize
        return values * self._live.limits.kv_tokens + 2 * MAX_STATE_BYTES

    def name(self, name: str, id: int) -> None:
        """Lets a front ask for a request by the ``name`` that its client was told."""
        self._names[name] = id

    def forget(self, name: str) -> None:
        """Forgets a request that has ended or whose client has left; one that left this replica is gone then."""
        self._names.pop(name, None)
        if self._parked.pop(name, None) is not None:
            self.left += 1

    def costs(self) -> dict[str, Any]:
        """Returns what a front chooses by: what a prompt costs here, and whether keys and values can be taken over."""
        profile = self._live.profile
        return {
            "model": self.model,
            "step_fixed_s": profile.step_fixed_s,
            "prompt_s": profile.prompt_s,
            "pair_s": profile.pair_s,
            "kv_bytes_per_token": profile.kv_bytes_per_token,
            "takes_blocks": self._cache.movable,
        }

    async def part(self, name: str) -> bytes:
        """Returns what is computed of a request by now, which goes on. Raises NotYours if it has ended or left."""
        id = self._id(name)

        def read() -> KeysValues | None:
            life = self._live.engine.lives.get(id)
            if life is None:
                raise NotYours("no such request is under way")
            return self._read(life, 0)

        kept = await self._live.between_steps(read)
        return await asyncio.to_thread(pack, {"tokens": 0 if kept is None else kept[0].shape[2]}, kept)

    async def leave(self, name: str, first: int | None) -> bytes:
        """Stops a request and returns its state, with the keys and values from token ``first`` on (None: without).

        Raises NotYours if it has ended or left.
        """
        id = self._id(name)

        def stop() -> tuple[dict[str, Any], KeysValues | None, _Parked]:
            life, reply = self._live.engine.lives.get(id), self._live.reply_of(id)
            if life is None or reply is None:
                raise NotYours("no such request is under way")
            kept = None if first is None else self._read(life, first)
            state = self._state(life, kept, first)
            self._live.take_out(id)
            return state, kept, _Parked(life, reply)

        state, kept, parked = await self._live.between_steps(stop)
        if parked.reply.over:  # its client left meanwhile
            raise NotYours("no such request is under way")
        self._parked[name] = parked
        asyncio.get_running_loop().call_later(PARKED_S, self._overdue, name, parked)
        return await asyncio.to_thread(pack, state, kept)

    async def stay(self, name: str) -> None:
        """Goes on with a request that left and arrived nowhere. Raises NotYours if it did not leave.

        It ends with Overloaded if others have taken its place, and with Unavailable if the server is stopping.
        """
        parked = self._parked.pop(name, None)
        if parked is None:
            raise NotYours("no such request has left")
        self._go_on(parked)

    async def keep_part(self, handle: str, body: bytes | bytearray) -> None:
        """Keeps what was computed of a request that will arrive. Raises InvalidInput."""
        _, kept = await asyncio.to_thread(unpack, body, self._shape)
        if kept is None:
            raise InvalidInput("a part holds keys and values")
        arriving = sum(keys.shape[2] for keys, _ in self._parts.values()) + kept[0].shape[2]
        if arriving > self._live.limits.kv_tokens or len(self._parts) >= self._live.limits.rows:
            raise InvalidInput("the requests that are arriving do not fit here; try again later")
        self._parts[handle] = kept
        asyncio.get_running_loop().call_later(PARTS_S, self._parts.pop, handle, None)

    async def arrive(self, handle: str, body: bytes | bytearray) -> Reply:
        """Goes on with a request that left another replica. Its first piece is all text of the tokens that it has.

        Raises InvalidInput for what is no request or of another model, and Overloaded if there is no room for it.
        """
        state, rest = await asyncio.to_thread(unpack, body, self._shape)
        part = self._parts.pop(handle, None)
        if state.get("model") != self.model:
            raise InvalidInput("the request comes from a replica with another model or number type")
        kept = await asyncio.to_thread(_joined, part, rest, state.get("first"))
        if kept is not None and (not self._cache.movable or kept[0].shape[2] != state.get("computed")):
            kept = None
        life = self._life(state, 0 if kept is None else kept[0].shape[2])
        text = self._text(life.request.stops)
        said = "".join(text.add(token)[0] for token in life.tokens)

        def go_on() -> Reply:
            reply, blocks = self._live.take_in(life, text, said)
            if kept is not None:
                self._cache.place(life.id, blocks, *kept)
            self.arrived += 1
            return reply

        return await self._live.between_steps(go_on)

    def _id(self, name: str) -> int:
        if name not in self._names or name in self._parked:
            raise NotYours("no such request is under way")
        return self._names[name]

    def _read(self, life: Life, first: int) -> KeysValues | None:
        """Returns what is computed from token ``first`` on; None if the cache does not have it, or cannot be read."""
        stored = self._cache.tokens(life.id)
        if not self._cache.movable or not 0 < stored == life.computed or first > stored:
            return None
        return self._cache.read(life.id, self._live.engine.blocks_of(life.id), first, life.computed)

    def _state(self, life: Life, kept: KeysValues | None, first: int | None) -> dict[str, Any]:
        request, sampling, now_s = life.request, life.request.sampling, self._clock()
        return {
            "model": self.model,
            "prompt": list(request.prompt),
            "tokens": list(life.tokens),
            "computed": 0 if kept is None else life.computed,
            "first": first,
            "sampling": [sampling.temperature, sampling.top_p, sampling.seed],
            "stops": list(request.stops),
            "waited_s": now_s - request.arrival_s,
            "first_token_after_s": None if life.first_token_s is None else life.first_token_s - request.arrival_s,
            "latency_s": None if request.deadline_s is None else request.deadline_s - request.arrival_s,
            **{name: getattr(request, name) for name in _COPIED},
        }

    def _life(self, state: Mapping[str, Any], computed: int) -> Life:
        """Returns the request of a state, as if it had arrived here. Raises InvalidInput."""
        try:
            arrival_s = self._clock() - float(state["waited_s"])
            temperature, top_p, seed = state["sampling"]
            tokens = [int(token) for token in state["tokens"]]
            request = Request.asked(
                self._live.next_id(),
                [int(token) for token in state["prompt"]],
                arrival_s=arrival_s,
                context=self._context,
                limit=self._context,
                sampling=Sampling(float(temperature), float(top_p), int(seed)),
                stops=tuple(str(stop) for stop in state["stops"]),
                latency_s=state["latency_s"],
                **{name: state[name] for name in _COPIED},
            )
            after_s = state["first_token_after_s"]
            first_s = None if after_s is None else arrival_s + float(after_s)
            # What is wrong here would fail a step later, and with it the requests of others.
            if not all(isinstance(each, str) for each in (request.user, request.kind, request.salt)):
                raise TypeError("a name is no text")
            if not math.isfinite(arrival_s) or not math.isfinite(first_s or 0.0) or type(request.max_tokens) is not int:
                raise ValueError("a number is not finite, or not whole")
            if not abs(request.sampling.seed) < 1 << 63:
                raise ValueError("the seed is too large")
            if not all(0 <= token < self._vocabulary for token in (*request.prompt, *tokens)):
                raise ValueError("a token is not in the vocabulary")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(f"not a request that is moved: {type(error).__name__}") from error
        if len(tokens) >= request.max_tokens or not 0 <= computed < len(request.prompt) + len(tokens):
            raise InvalidInput("not a request that is moved: it has ended")
        life = Life(request, tokens, computed, begun_s=arrival_s, first_token_s=first_s, last_token_s=first_s)
        life.recomputed = 0 if computed or not tokens else len(request.prompt) + len(tokens) - 1
        return life

    def _back(self, parked: _Parked) -> None:
        """Goes on here; if others have taken the room meanwhile, the client gets an error."""
        parked.life.recomputed += parked.life.computed
        parked.life.computed = 0
        self._live.take_back(parked.life, parked.reply)

    def _overdue(self, name: str, parked: _Parked) -> None:
        """Lets a request that left and arrived nowhere go on here."""
        if self._parked.get(name) is parked:
            del self._parked[name]
            log.warning("a request that left has arrived nowhere, and goes on here")
            self._go_on(parked)

    def _go_on(self, parked: _Parked) -> None:
        try:
            self._live.soon(lambda: self._back(parked))
        except Unavailable as error:
            parked.reply.put(error)


def _joined(part: KeysValues | None, rest: KeysValues | None, first: Any) -> KeysValues | None:
    """Returns the keys and values of both, if the rest begins where the part ends; None if they are not all."""
    if rest is None or not isinstance(first, int):
        return None
    if first == 0:
        return rest
    if part is None or part[0].shape[2] < first:
        return None
    keys, values = (torch.cat((old[:, :, :first], new), dim=2) for old, new in zip(part, rest, strict=True))
    return keys, values
