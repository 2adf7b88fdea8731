"""What a page shows of a device: plain facts that JSON can hold, made of its state."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from isthmus.edge.agent.asking import LinkMemory
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.link.controller import overdue_s
from isthmus.edge.own_clips.corrections import Correction
from isthmus.edge.own_clips.own_clips import StoredVerdict
from isthmus.edge.own_clips.person import Person
from isthmus.edge.own_clips.personal import Personal, person_facts
from isthmus.edge.own_clips.store import ClipStore
from isthmus.edge.own_clips.window import Window

MOST_CHANGES: Final = 50

_ESTIMATES: Final = {
    "corrections": "accuracy on the clips that you have corrected",
    "present": "agreement with the student in use",
}


def clips(store: ClipStore) -> dict[str, Any]:
    """Return the stored clips, newest first, and whether capture is paused."""
    found = [
        {
            "name": clip.name,
            "captured_s": clip.captured_s,
            "sound": clip.sound,
            "picture": clip.picture,
            "kept": clip.kept,
            "bytes": clip.size_bytes,
        }
        for clip in reversed(store.clips())
    ]
    limits = {"clips": store.limits.clips, "bytes": store.limits.bytes, "age_s": store.limits.age_s}
    return {"clips": found, "paused": store.paused, "limits": limits}


def link(memory: LinkMemory, now_s: float, *, asks: bool) -> dict[str, Any]:
    """Return what the controller knows of the link. Times are in seconds before now; a lost answer took None.

    ``asks``: whether the device may ask the cloud about clips.
    """
    history = memory.history
    samples = [
        {
            "ago_s": now_s - each.at_s,
            "bytes": each.frame_bytes,
            "took_s": each.elapsed_s if math.isfinite(each.elapsed_s) else None,
        }
        for each in history.samples
    ]
    setting = memory.setting
    return {
        "asks": asks,
        "worth": memory.worth,
        "samples": samples,
        "in_flight": len(history.in_flight),
        "overdue_s": overdue_s(history, now_s),
        "heard_ago_s": now_s - history.heard_s if math.isfinite(history.heard_s) else None,
        "failures": history.failures,
        "chance": memory.probability,
        "setting": None if setting is None else {"ratio": setting.ratio, "number_type": setting.number_type.value},
        "asked": memory.asked,
        "in_time": memory.in_time,
        "late": memory.late,
        "lost": memory.lost,
    }


def answers(reading: Personal, window: Window, classes: Sequence[str]) -> dict[str, str]:
    """Return how each clip of the window is answered with this reading."""
    answers_NC = reading.answers(window.features_MND, window.present_NM, window.raw_NC)
    return {name: classes[int(row_C.argmax())] for name, row_C in zip(window.names, answers_NC, strict=True)}


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the clips whose answer is another one now, at most ``MOST_CHANGES``."""
    changed = [
        {"clip": name, "before": before[name], "after": label}
        for name, label in after.items()
        if name in before and before[name] != label
    ]
    return changed[:MOST_CHANGES]


def mine(state: DeviceState, person: Person, active_id: str, base_id: str) -> dict[str, Any]:
    """Return what the device knows of its user, and what that has changed."""
    classes = person.classes(active_id)
    reading, window, said = person.reading(active_id), state.window(active_id), person.said().corrections
    unsaid = person.unsaid(active_id) if said else reading  # The estimate takes most of the time of a page's request.
    facts = None if reading is None else person_facts(reading, classes)
    with_labels = {} if reading is None or window is None else answers(reading, window, classes)
    without = {} if unsaid is None or window is None else answers(unsaid, window, classes)
    return {
        "classes": list(classes),
        "sentences": [] if facts is None else list(facts.sentences),
        "clips": 0 if facts is None else facts.clips,
        "offset": {} if facts is None else {name: list(row) for name, row in facts.offset.items()},
        "often": [] if facts is None else list(facts.prior),
        "corrections": [
            {"clip": each.clip, "label": each.label, "said_s": each.said_s, "without": without.get(each.clip)}
            | {"now": with_labels.get(each.clip)}
            for each in reversed(said[-MOST_CHANGES:])
        ],
        "changed": changes(without, with_labels),
        "remembered": len(with_labels),
        "answers": [{"clip": name, "label": label} for name, label in reversed(with_labels.items())],
        "labelled": _labelled(classes, window, state.window(base_id) if said and base_id else None, unsaid, said),
    }


def verdict(stored: StoredVerdict | None) -> dict[str, Any] | None:
    """Return the last comparison of two students: before, after, and by which estimate."""
    if stored is None:
        return None
    return {
        "accepted": stored.accept,
        "reason": stored.reason,
        "clips": stored.clips,
        "changed": stored.changed,
        "by": _ESTIMATES.get(stored.estimator, stored.estimator),
        "before": stored.old.get(stored.estimator),
        "after": stored.new.get(stored.estimator),
    }


def _labelled(
    classes: Sequence[str],
    active: Window | None,
    base: Window | None,
    unsaid: Personal | None,
    said: Sequence[Correction],
) -> dict[str, Any] | None:
    """Return how many of the corrected clips the base student and the one in use answer as the person said.

    The base student answers as it is. The other one's answers are read for the user, without any correction: with them
    it would only repeat what the person said.
    """
    labels = {each.clip: each.label for each in said}
    if not labels or active is None or unsaid is None:
        return None
    after = answers(unsaid, active, classes)
    first = base or active
    before = {
        name: classes[int(row_C.argmax())] for name, row_C in zip(first.names, np.asarray(first.raw_NC), strict=True)
    }
    both = [name for name in labels if name in after and name in before]
    return {
        "clips": len(both),
        "before": sum(before[name] == labels[name] for name in both),
        "after": sum(after[name] == labels[name] for name in both),
        "base": base is not None,
    }
