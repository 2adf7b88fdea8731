"""Answering clips one by one as they come, at the setting the link allows: a device that runs on and on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from isthmus.data.clip import ClipRef
from isthmus.data.layouts.listing import read_listing
from isthmus.edge.agent.behaviour import Answered, Answering, Failed, Tick
from isthmus.edge.agent.inference import Answer, CloudAnswers, answer_locally
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.capture.sources import Taken
from isthmus.edge.link.compression import Setting, choose, make_policy
from isthmus.edge.student.encoder import encode
from isthmus.proto.errors import Unavailable
from isthmus.proto.messages import NumberType

PROBE_EVERY_S = 10.0
"""While the link is too slow for the budget, one clip in this time is tried on it, or a better link goes unseen."""


@dataclass(frozen=True)
class LiveAnswer:
    """``setting`` None: answered on the device."""

    name: str
    answer: Answer
    setting: Setting | None


class LiveAnswers:
    """Answers with the current student. The local answer stands in wherever the cloud's does not come in time."""

    def __init__(self, runtime: Runtime, latency_budget_s: float) -> None:
        active_id = runtime.state.active_id
        manifest = runtime.slot.installed(active_id).manifest
        self._runtime = runtime
        self._spec = runtime.spec
        self._encoder = runtime.clips.encoder(active_id)
        self._habits = runtime.clips.habits(active_id)
        self._policy = make_policy(manifest.feature_width, manifest.ratios, tuple(NumberType), latency_budget_s)
        self._cloud = CloudAnswers(
            runtime.link,
            self._encoder,
            manifest,
            runtime.clock,
            on_failure=lambda error: None,
            timeout_s=latency_budget_s,
            most_tries=1,
            estimate=runtime.estimate,
        )
        self._setting: Setting | None = None
        self._probe_at_s = runtime.clock()

    def answer(self, taken: Taken, jitter: float) -> LiveAnswer:
        """``jitter`` in [0, 1) spreads the retries of devices that lose the cloud together."""
        features = encode(self._encoder, taken, self._spec, self._runtime.clock).features
        self._setting = self._choose()
        if self._setting is not None:
            answer = self._cloud.ask(features, self._setting).under(self._habits)
            if answer.probabilities_C is not None:
                self._runtime.note_link(Answered())
                return LiveAnswer(taken.ref.name, answer, self._setting)
            self._runtime.note_link(Failed(Unavailable(answer.error), jitter))
        alone = answer_locally(self._encoder, features, self._runtime.clock).under(self._habits)
        return LiveAnswer(taken.ref.name, alone, None)

    def close(self) -> None:
        self._cloud.close()

    def _choose(self) -> Setting | None:
        now_s = self._runtime.clock()
        link_up = self._runtime.note_link(Tick()) is Answering.CLOUD
        setting = choose(self._policy, self._cloud.estimate, self._setting, link_up=link_up)
        if setting is None and link_up and now_s >= self._probe_at_s:
            setting = self._policy.settings[-1]
        if setting is not None:
            self._probe_at_s = now_s + PROBE_EVERY_S
        return setting


class Pause(Protocol):
    def __call__(self, seconds: float, /) -> None: ...


def appearing_clips(data: Path, layout: str, seen: set[str], pause: Pause, every_s: float = 1.0) -> Iterator[ClipRef]:
    """Clips that come into the folder and are not in ``seen``, for ever. Raises ValueError where the folder goes."""
    while True:
        for ref in read_listing(data, layout).refs:  # not the incomplete: their other file may still be on its way
            if ref.name not in seen:
                seen.add(ref.name)
                yield ref
        pause(every_s)
