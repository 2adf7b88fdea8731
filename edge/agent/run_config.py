"""A person's choices for a run of a device."""

from dataclasses import dataclass, field

from isthmus.edge.own_clips.selection_pass import PrototypeChoices


@dataclass(frozen=True)
class RunConfig:
    """A person's choices for a run.

    ``rounds``: the most uploads of one personalisation; 0 keeps the number that was pinned at enrolment.
    ``epsilon_budget``: the most epsilon that all uploads of this device may spend; None keeps the known budget.
    ``guard``: a new student is accepted only if it is good enough. ``habits``: answers use how often this user is in
    each state. Without ``ask_cloud`` live clips are answered by the device alone, so no features leave it.

    >>> RunConfig("kiosk", guard=False).habits
    True
    """

    device_name: str
    enrolment_key: str = ""
    seed: int = 0
    rounds: int = 0
    guard: bool = True
    habits: bool = True
    epsilon_budget: float | None = None
    choices: PrototypeChoices = field(default_factory=PrototypeChoices)
    ask_cloud: bool = True
