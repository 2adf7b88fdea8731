"""Live questions to the cloud: whether to ask, the question, and its answer if it comes in time.

``edge/link/controller.py`` decides; this file holds the stream and reports to the controller what the link does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from isthmus.edge.agent.inference import SESSION_TIMEOUT_S, Answer
from isthmus.edge.behaviour.pauses import HINT_MOST_S
from isthmus.edge.capture.sources import Clock
from isthmus.edge.link import controller
from isthmus.edge.link.compression import Policy, Setting
from isthmus.edge.link.controller import LinkHistory
from isthmus.edge.link.interface import InferSession, Link
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.proto.codec import pack_frame
from isthmus.proto.errors import Busy, InvalidInput, IsthmusError, TooLate, Unavailable
from isthmus.proto.messages import FeatureFrame, Features, StudentManifest

RENEW_SESSION_S = 0.9 * SESSION_TIMEOUT_S
"""A stream is opened again at this age, between two clips, so that its deadline ends no question."""


@dataclass
class LinkMemory:
    """What outlives a student: the history of the link, the last setting, and counts since the start.

    ``late``: answers that came after their clip had been answered. ``lost``: those that never came. ``worth``: by how
    much more accurate than the device's own the cloud's answers were measured to be, at best; None before any question.
    """

    history: LinkHistory = field(default_factory=LinkHistory)
    setting: Setting | None = None
    probability: float = 0.0
    worth: float | None = None
    asked: int = 0
    in_time: int = 0
    late: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Question:
    """A frame on its way. ``sent_s``: on the device's clock."""

    sequence: int
    sent_s: float
    compress_ms: float
    up_bytes: int


@dataclass
class CloudQuestions:
    """Questions to one student's heads in the cloud. ``jitter`` returns numbers in [0, 1)."""

    link: Link
    encoder: StudentEncoder
    manifest: StudentManifest
    policy: Policy
    memory: LinkMemory
    clock: Clock
    jitter: Callable[[], float]
    _session: InferSession | None = None
    _opened_s: float = 0.0
    _sequence: int = 0

    def choose(self, budget_s: float) -> Setting | None:
        """Return the setting at which the next clip should be asked; None means that the device answers alone.

        ``budget_s``: the seconds that are left for the clip. Raises the link's error if the stream broke meanwhile.
        """
        self._listen()
        memory, now_s = self.memory, self.clock()
        if controller.is_stuck(memory.history, now_s):
            self._drop()
            self._lose(controller.renewed(memory.history, now_s))
            self.link.renew()
        elif self._session is not None and now_s - self._opened_s > RENEW_SESSION_S:
            self.close()
        worth = controller.worths(self.policy, self.manifest.measured, self.manifest.ratios)
        choice = controller.decide(self.policy, memory.history, worth, memory.setting, budget_s, now_s)
        memory.worth = max(worth, default=0.0)
        memory.probability = choice.probability
        memory.setting = choice.setting or memory.setting
        return choice.setting

    def pack(self, features: Features, setting: Setting) -> bytes:
        """Return the frame of a clip. Raises Corrupt for a student that fails."""
        compressed = self.encoder.compress(features, setting.ratio)
        return pack_frame(FeatureFrame(compressed, setting.ratio, setting.number_type))

    def send(self, frame: bytes, compress_ms: float) -> Question:
        """Send a frame. Raises the link's errors, after it has noted them."""
        sent_s, sent_before = self.clock(), self.link.traffic.up_bytes["inference"]
        try:
            if self._session is None:
                self._session = self.link.open_infer(self.manifest.student_id, timeout_s=SESSION_TIMEOUT_S)
                self._opened_s, self._sequence = sent_s, 0
            self._sequence += 1
            self._session.send(self._sequence, frame)
        except IsthmusError as error:
            self._broke(error)
            raise
        self.memory.asked += 1
        self.memory.history = controller.sent(self.memory.history, self._sequence, len(frame), sent_s)
        up_bytes = self.link.traffic.up_bytes["inference"] - sent_before
        return Question(self._sequence, sent_s, compress_ms, up_bytes)

    def answer(self, question: Question, timeout_s: float) -> Answer:
        """Wait for the answer. Raises TooLate if it has not come, and other errors of the link after noting them."""
        if self._session is None:
            raise Unavailable("the stream is closed")
        try:
            reply = self._session.receive(question.sequence, timeout_s=max(0.0, timeout_s))
            classes = len(self.manifest.classes)
            if reply.probabilities_C is not None and len(reply.probabilities_C) != classes:
                raise InvalidInput(f"the cloud answered {len(reply.probabilities_C)} classes of {classes}")
        except TooLate:
            raise
        except IsthmusError as error:
            self._broke(error)
            raise
        now_s = self.clock()
        self.memory.history = controller.arrived(self.memory.history, question.sequence, now_s)
        if reply.probabilities_C is None:
            raise Unavailable(reply.error_message)
        self.memory.in_time += 1
        return Answer(
            reply.probabilities_C,
            total_ms=question.compress_ms + (now_s - question.sent_s) * 1000,
            compress_ms=question.compress_ms,
            round_trip_ms=(now_s - question.sent_s) * 1000,
            server_ms=reply.server_ms,
            up_bytes=question.up_bytes,
        )

    def close(self) -> None:
        """Close the stream, not the link."""
        self._drop()
        self._lose(controller.closed(self.memory.history))

    def _listen(self) -> None:
        """Note the answers that came too late, and whether the stream broke meanwhile."""
        if self._session is None:
            return
        try:
            for sequence, ago_s in self._session.late():
                self.memory.late += 1
                self.memory.history = controller.arrived(self.memory.history, sequence, self.clock() - ago_s)
        except IsthmusError as error:
            self._broke(error)
            raise

    def _broke(self, error: IsthmusError) -> None:
        self._drop()
        hint_s = (isinstance(error, Busy) and error.retry_after_s) or 0.0
        self._lose(
            controller.broke(self.memory.history, self.clock(), self.jitter(), not_before_s=min(hint_s, HINT_MOST_S))
        )

    def _lose(self, after: LinkHistory) -> None:
        self.memory.lost += len(self.memory.history.in_flight)
        self.memory.history = after

    def _drop(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
