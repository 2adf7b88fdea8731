"""What this device says of how its user feels, once the person has allowed it: a class and a rounded probability.

<root>/sharing.json   what would be sent now, and how often it was; without consent, only how often it was
"""

from dataclasses import dataclass
from typing import Any, Final

from isthmus.proto.messages import FloatArray

FRESH_S: Final = 600.0
"""An older state is not sent: it says nothing of how the person feels now."""
STEP: Final = 0.1
"""Probabilities are rounded to multiples of this, so that a state is one of few that many people share."""


@dataclass(frozen=True)
class Sharing:
    """``name`` and ``probability`` of the newest answer, at ``at_s`` in Unix time; "" if nothing may be sent.

    ``sent`` counts what has left the device, and ``sent_bytes`` its bytes.
    """

    allowed: bool = False
    name: str = ""
    probability: float = 0.0
    at_s: float = 0.0
    sent: int = 0
    sent_bytes: int = 0

    def __post_init__(self) -> None:
        kinds = {"allowed": bool, "name": str, "sent": int, "sent_bytes": int}
        if any(type(getattr(self, field)) is not kind for field, kind in kinds.items()):
            raise ValueError("sharing")
        if not (0 <= self.probability <= 1 and self.at_s >= 0 and min(self.sent, self.sent_bytes) >= 0):
            raise ValueError("sharing")

    def may_be_sent(self, now_s: float) -> bool:
        """Whether there is a state that is new enough, and consent."""
        return self.allowed and bool(self.name) and now_s - self.at_s <= FRESH_S

    @property
    def message(self) -> dict[str, Any]:
        """Exactly what is sent."""
        return {"class": self.name, "probability": self.probability}


def noted(sharing: Sharing, classes: tuple[str, ...], probabilities_C: FloatArray, now_s: float) -> Sharing:
    """Returns the sharing with the state that an answer shows.

    >>> import numpy as np
    >>> noted(Sharing(allowed=True), ("calm", "sad"), np.array([0.33, 0.67], np.float32), 5.0).message
    {'class': 'sad', 'probability': 0.7}
    """
    if not sharing.allowed:
        return sharing
    best = int(probabilities_C.argmax())
    rounded = round(round(float(probabilities_C[best]) / STEP) * STEP, 1)
    return Sharing(True, classes[best], rounded, now_s, sharing.sent, sharing.sent_bytes)


def consented(sharing: Sharing, *, allowed: bool) -> Sharing:
    """Returns the sharing after the person has allowed or forbidden it. Without consent no state is kept."""
    if allowed:
        return Sharing(True, sharing.name, sharing.probability, sharing.at_s, sharing.sent, sharing.sent_bytes)
    return Sharing(sent=sharing.sent, sent_bytes=sharing.sent_bytes)
