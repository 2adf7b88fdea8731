"""Answers to clips: encode once, then answer locally, or through the cloud at a ratio and number type.

A stream that breaks is opened again a bounded number of times. A clip that the cloud cannot answer gets an answer with
an error; the caller keeps the local one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from isthmus.edge.capture.sources import Clock
from isthmus.edge.link.compression import LinkEstimate, Setting, observe_answer
from isthmus.edge.link.interface import InferSession, Link
from isthmus.edge.own_clips.personal import Reading
from isthmus.edge.student.encoder import StudentEncoder
from isthmus.proto.codec import pack_frame
from isthmus.proto.errors import Busy, InvalidInput, IsthmusError, TooLate, Unavailable
from isthmus.proto.messages import FeatureFrame, Features, FloatArray, InferReply, StudentManifest

SESSION_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 20.0
MOST_TRIES = 8


@dataclass(frozen=True)
class Answer:
    """Probabilities (C,), or the reason why there are none. ``up_bytes``: size of the whole request message.

    ``retry_after_s``: after how many seconds a busy cloud asks to be tried again, if it says so.
    """

    probabilities_C: FloatArray | None
    error: str = ""
    total_ms: float = 0.0
    compress_ms: float = 0.0
    round_trip_ms: float = 0.0
    server_ms: float = 0.0
    up_bytes: int = 0
    retry_after_s: float | None = None

    @property
    def predicted(self) -> int | None:
        return None if self.probabilities_C is None else int(self.probabilities_C.argmax())

    def read(self, reading: Reading | None, features: Features, *, cloud: bool) -> "Answer":
        """Return the answer to a clip of these features as it is read for the user; unchanged without a reading or an
        answer. ``cloud``: the cloud's head gave it."""
        if reading is None or self.probabilities_C is None:
            return self
        read = reading.cloud if cloud else reading.local
        return replace(self, probabilities_C=read(self.probabilities_C, features))


OnFailure = Callable[[IsthmusError], None]
"""Called with the error before the next try; returns when it is time to try again."""


def answer_locally(encoder: StudentEncoder, features: Features, clock: Clock) -> Answer:
    began_s = clock()
    probabilities_C = encoder.local_probabilities(features)
    return Answer(probabilities_C, total_ms=(clock() - began_s) * 1000)


@dataclass
class CloudAnswers:
    """Requests to one student's heads in the cloud, over one stream that is opened again when it breaks.

    ``estimate`` is the present estimate of the link.
    """

    link: Link
    encoder: StudentEncoder
    manifest: StudentManifest
    clock: Clock
    on_failure: OnFailure
    timeout_s: float = ANSWER_TIMEOUT_S
    most_tries: int = MOST_TRIES
    estimate: LinkEstimate = field(default_factory=LinkEstimate)
    _session: InferSession | None = None
    _sequence: int = 0

    def ask(self, features: Features, setting: Setting) -> Answer:
        """Ask for one clip at one setting. Errors of the link are not raised: the answer contains them."""
        began_s = self.clock()
        compressed = self.encoder.compress(features, setting.ratio)
        frame = pack_frame(FeatureFrame(compressed, setting.ratio, setting.number_type))
        compress_ms = (self.clock() - began_s) * 1000
        sent_before = self.link.traffic.up_bytes["inference"]
        asked_s = self.clock()
        try:
            reply = self._reply(frame)
        except IsthmusError as error:
            if isinstance(error, TooLate):
                self.estimate = observe_answer(self.estimate, len(frame), self.clock() - asked_s, 0.0)
            hint_s = error.retry_after_s if isinstance(error, Busy) else None
            return Answer(None, error=str(error), compress_ms=compress_ms, retry_after_s=hint_s)
        elapsed_s = self.clock() - asked_s
        self.estimate = observe_answer(self.estimate, len(frame), elapsed_s, reply.server_ms / 1000)
        return Answer(
            reply.probabilities_C,
            error=reply.error_message,
            total_ms=compress_ms + elapsed_s * 1000,
            compress_ms=compress_ms,
            round_trip_ms=elapsed_s * 1000,
            server_ms=reply.server_ms,
            up_bytes=self.link.traffic.up_bytes["inference"] - sent_before,
        )

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _reply(self, frame: bytes) -> InferReply:
        tries = 0
        while True:
            tries += 1
            try:
                if self._session is None:
                    self._session = self.link.open_infer(self.manifest.student_id, timeout_s=SESSION_TIMEOUT_S)
                    self._sequence = 0
                self._sequence += 1
                reply = self._session.ask(self._sequence, frame, timeout_s=self.timeout_s)
            except IsthmusError as error:
                self.close()
                if tries >= self.most_tries or not (error.retryable or isinstance(error, TooLate)):
                    raise
                self.on_failure(error if error.retryable else Unavailable(str(error)))
                continue
            classes = len(self.manifest.classes)
            if reply.probabilities_C is not None and len(reply.probabilities_C) != classes:
                raise InvalidInput(f"the cloud answered {len(reply.probabilities_C)} classes of {classes}")
            if reply.probabilities_C is None and reply.retryable and tries < self.most_tries:
                self.on_failure(Unavailable(reply.error_message))
                continue
            return reply


def accuracy(predicted: Sequence[int | None], labels: Sequence[int | None]) -> float | None:
    """Return the accuracy over the clips with a label; None if no clip has one."""
    pairs = [(guess, label) for guess, label in zip(predicted, labels, strict=True) if label is not None]
    return None if not pairs else float(np.mean([guess == label for guess, label in pairs]))
