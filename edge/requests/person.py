"""Requests about the user: corrections, questions, and the state that is shared."""

import json
import time
from dataclasses import replace
from typing import Any

from isthmus.edge.own_clips.person import Person
from isthmus.edge.own_clips.personal import Personal
from isthmus.edge.requests import shown
from isthmus.edge.requests.device import Device, messages_of, person_of
from isthmus.edge.requests.table import request


@request(changes=True)
def correct(device: Device, clip: str, label: str) -> dict[str, Any]:
    """Learn what the person said of a clip."""
    person, student_id = person_of(device)
    before = person.reading(student_id)
    after = person.correct(student_id, clip, label, time.time())
    changed = _changed(device, person, student_id, before, after)
    return {"clip": clip, "label": label, "corrections": after.corrections, "changed": changed}


@request(changes=True)
def undo_correction(device: Device) -> dict[str, Any]:
    """Take back the newest correction."""
    person, student_id = person_of(device)
    before = person.reading(student_id)
    gone, after = person.undo(student_id)
    changed = _changed(device, person, student_id, before, after)
    return {"clip": gone.clip, "label": gone.label, "corrections": after.corrections, "changed": changed}


@request(changes=True)
def question(device: Device, a_day: int = -1) -> dict[str, Any]:
    """Return the clip whose label would teach the device most. ``a_day`` of 0 or more sets how often it may ask."""
    person, student_id = person_of(device)
    asked = person.question(student_id, time.time(), a_day=None if a_day < 0 else a_day)
    return {"clip": asked.clip, "guesses": dict(asked.guesses)}


@request(changes=True)
def share_state(device: Device) -> dict[str, Any]:
    """Return what is sent of how the user feels, and count it as sent; an empty object if nothing may be sent."""
    sharing = device.state.sharing()
    if not sharing.may_be_sent(time.time()):
        return {}
    content = json.dumps(sharing.message).encode()
    device.state.save_sharing(replace(sharing, sent=sharing.sent + 1, sent_bytes=sharing.sent_bytes + len(content)))
    with messages_of(device) as messages:
        messages.note_state(content)
    return sharing.message


def _changed(
    device: Device, person: Person, student_id: str, before: Personal | None, after: Personal
) -> list[dict[str, str]]:
    """Return which of the remembered clips are answered differently now."""
    window = device.state.window(student_id)
    if before is None or window is None:
        return []
    classes = person.classes(student_id)
    return shown.changes(shown.answers(before, window, classes), shown.answers(after, window, classes))
