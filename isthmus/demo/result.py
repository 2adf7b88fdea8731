"""``result.json``: every answer to every test clip, and what follows from it: the closing sentence, and the gains."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from isthmus.data.files import write_atomically
from isthmus.demo.outcome import WAYS, DemoOutcome

NAME: Final = "result.json"
GAINS: Final = "gains.json"
BEYOND: Final = 2.0
"""Standard errors that a gain must exceed to be called one."""


def result_of(outcome: DemoOutcome) -> dict[str, Any]:
    """Return the content of result.json. Lists have an entry per test clip, in the same order: that of ``clips``.

    A class is an index into ``classes``; in ``predicted``, null means that the clip was not answered. ``spoken`` is
    there if a language model replied.
    """
    return {
        "seconds": outcome.total_seconds,
        "seed": outcome.seed,
        "data": outcome.data_name,
        "synthetic": outcome.synthetic,
        "preset": outcome.preset,
        "classes": list(outcome.classes),
        "clients": [
            {
                "name": client.name,
                "classes": list(client.own_classes),
                "clips": list(client.tested.names),
                "labels": list(client.tested.labels),
                **{way: list(client.tested.right(way)) for way in WAYS},
                "predicted": {way: list(client.tested.predicted[way]) for way in WAYS},
                "corrections": [
                    {"clip": one.clip, "guess": one.guess, "label": one.label} for one in client.corrections
                ],
                **({} if client.spoken is None else {"spoken": asdict(client.spoken)}),
            }
            for client in outcome.clients
        ],
    }


def write_result(outcome: DemoOutcome, folder: Path) -> dict[str, Any]:
    """Write result.json to ``folder`` and return its content."""
    result = result_of(outcome)
    write_atomically(folder / NAME, json.dumps(result, indent=1) + "\n")
    return result


def closing_sentence(result: Mapping[str, Any]) -> str:
    """Return one sentence for a layman about what result.json says, and what of it may be chance."""
    parts = []
    for client in result["clients"]:
        before, alone, taught = (sum(client[way]) for way in WAYS)
        corrections = len(client["corrections"])
        told = f", and {taught} after {corrections} corrections of these other clips" if corrections else ""
        parts.append(
            f"of {client['name']}'s {len(client['labels'])} clips Isthmus understood {before} at first, {alone} after "
            f"it had learned from other clips without being told anything{told}{_doubt(client)}"
        )
    return f"No recording left a device: {'; '.join(parts)}."


def _doubt(client: Mapping[str, Any]) -> str:
    """Return which of a client's changes are within ``BEYOND`` standard errors of its own clips, in words."""
    ways = WAYS[1:] if client["corrections"] else WAYS[1:2]
    pairs = {way: list(zip(client["before"], client[way], strict=True)) for way in ways}
    changes = {way: _gain(client["name"], way, of_way) for way, of_way in pairs.items() if of_way}
    small = {way: one for way, one in changes.items() if abs(one.points) <= BEYOND * one.error and one.points}
    kinds = {"gain" if one.points > 0 else "loss" for one in small.values()}
    if not small:
        return ""
    if len(small) == len(WAYS[1:]):
        return " (both changes may be chance)" if len(kinds) == 2 else f" (either {kinds.pop()} may be chance)"
    which = "" if len(changes) == 1 else " without labels" if WAYS[1] in small else " after corrections"
    return f" (the {kinds.pop()}{which} may be chance)"


@dataclass(frozen=True)
class Gain:
    """What a client gained in one of the ways, in points: the mean over paired clips and its standard error."""

    client: str
    way: str
    clips: int
    before: float
    """Accuracy before, in percent."""
    points: float
    error: float

    @property
    def beyond_chance(self) -> bool:
        """Whether the gain is beyond two standard errors."""
        return self.points > BEYOND * self.error


def gains(results: Sequence[Mapping[str, Any]]) -> tuple[Gain, ...]:
    """Return the gain of each client, clips of all results together. A client is its place: the people may differ.

    Raises ValueError for results without clips or with different numbers of clients.
    """
    if not results or len({len(result["clients"]) for result in results}) != 1:
        raise ValueError("gains need results with equally many clients")
    found = []
    for place, first in enumerate(results[0]["clients"]):
        names = dict.fromkeys(result["clients"][place]["name"] for result in results)
        for way in WAYS[1:]:
            pairs = [
                (before, after)
                for result in results
                for before, after in zip(result["clients"][place]["before"], result["clients"][place][way], strict=True)
            ]
            if not pairs:
                raise ValueError(f"{first['name']} has no test clips")
            found.append(_gain(", ".join(names), way, pairs))
    return tuple(found)


def _gain(client: str, way: str, pairs: Sequence[tuple[int, int]]) -> Gain:
    count = len(pairs)
    mean = sum(after - before for before, after in pairs) / count
    variance = sum((after - before - mean) ** 2 for before, after in pairs) / max(1, count - 1)
    return Gain(
        client,
        way,
        count,
        100 * sum(before for before, _ in pairs) / count,
        100 * mean,
        100 * math.sqrt(variance / count),
    )
