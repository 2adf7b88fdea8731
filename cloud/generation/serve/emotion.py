"""PURE: how a user's state enters the prompt: as one of a few fixed sentences, before the conversation.

The device sends a class and a probability, nothing else. The sentence is this module's, so no text of a device reaches
the system turn by this way. Every request of one class begins with the same tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from isthmus.proto.errors import InvalidInput

TEMPLATE: Final = "state-1"
"""Name of the sentences below. Another wording is another template, so that answers can be traced to it."""
LEAST_PROBABILITY: Final = 0.5
"""Below it nothing is said: a wrong guess of how somebody feels costs more than none."""
URGENT: Final = frozenset({"fear", "anger"})
URGENT_SHARE: Final = 0.5
"""The time to the first token that is asked for, of a user who is afraid or angry, counts this share of itself."""
_FEELS: Final = {
    "neutral": "calm",
    "happy": "happy",
    "sad": "sad",
    "fear": "afraid",
    "disgust": "disgusted",
    "anger": "angry",
}
_MANNER: Final = {
    "neutral": "Answer plainly.",
    "happy": "Share the good mood.",
    "sad": "Be gentle, and offer comfort first.",
    "fear": "Reassure them first, then answer in short, clear steps.",
    "disgust": "Acknowledge that it is unpleasant, then help.",
    "anger": "Stay calm, take the complaint seriously, and be brief.",
}
_CODES: Final = {"NEU": "neutral", "HAP": "happy", "SAD": "sad", "FEA": "fear", "DIS": "disgust", "ANG": "anger"}
"""The classes as CREMA-D, and so a device of the default release, names them."""


@dataclass(frozen=True, slots=True)
class Emotion:
    """How the user of a request feels, as their device found. ``probability`` is a multiple of 0.1."""

    name: str
    probability: float

    @staticmethod
    def asked(raw: Any) -> "Emotion":
        """Reads a client's ``{"class": ..., "probability": ...}``.

        The probability is rounded to 0.1, so a client that sends more digits gains nothing. Raises InvalidInput for
        other fields, unknown classes, and probabilities outside 0 to 1.
        """
        if not isinstance(raw, Mapping) or raw.keys() != {"class", "probability"}:
            raise InvalidInput("emotion: must be an object with 'class' and 'probability'")
        name, probability = raw["class"], raw["probability"]
        name = _CODES.get(name, name) if isinstance(name, str) else None
        if name not in _FEELS:
            raise InvalidInput(f"emotion: the class must be one of {', '.join((*_FEELS, *_CODES))}")
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
            raise InvalidInput("emotion: the probability must be from 0 to 1")
        return Emotion(name, round(float(probability), 1))

    @property
    def said(self) -> str:
        """The sentences for the system turn; empty below LEAST_PROBABILITY."""
        if self.probability < LEAST_PROBABILITY:
            return ""
        return f"The user seems to feel {_FEELS[self.name]}. {_MANNER[self.name]}"

    @property
    def urgent(self) -> bool:
        """Whether the first token is wanted sooner than the client asks for."""
        return bool(self.said) and self.name in URGENT


def with_emotion(messages: Sequence[Mapping[str, str]], emotion: Emotion | None) -> list[dict[str, str]]:
    """Returns the conversation with the user's state at the beginning of its system turn.

    >>> with_emotion([{"role": "user", "content": "Hello"}], Emotion("sad", 0.8))[0]["content"]
    'The user seems to feel sad. Be gentle, and offer comfort first.'
    """
    found = [dict(message) for message in messages]
    said = "" if emotion is None else emotion.said
    if not said:
        return found
    if found and found[0]["role"] == "system":
        found[0]["content"] = f"{said}\n\n{found[0]['content']}"
        return found
    return [{"role": "system", "content": said}, *found]
