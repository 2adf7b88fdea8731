"""Requests about the student: what it is, go back to the one before, and personalise again."""

from typing import Any, Final

from isthmus.edge.agent.runtime import roll_back
from isthmus.edge.requests.device import Device, slot_of
from isthmus.edge.requests.table import request
from isthmus.proto.errors import WrongState

FEWEST_CLIPS: Final = 6
"""A personalisation on request needs so many clips."""


@request(changes=True)
def rollback(device: Device) -> dict[str, Any]:
    """Go back to the student that was in use before."""
    if device.runtime is not None:
        installed = device.runtime.rollback()
    else:
        installed, agent = roll_back(slot_of(device), device.agent)
        device.state.save_agent(agent)
    return {"student": installed.manifest.student_id, "kind": installed.manifest.kind}


@request(changes=False)
def personalise(device: Device) -> dict[str, Any]:
    """Begin a personalisation with the clips that are here. Raises WrongState if that cannot be now."""
    reason = why_not(device)
    if reason or device.life is None:
        raise WrongState(reason)
    device.life.personalise.set()
    return {}


def why_not(device: Device) -> str:
    """Return why no personalisation can begin now; "" if one can."""
    if device.runtime is None or device.life is None:
        return "the device does not run"
    if not device.life.learns:
        return "people share this device and nobody is named: start it with --person NAME"
    state, stored = device.runtime.state, len(device.store.clips())
    if not state.active_id:
        return "the first student is not here yet"
    if device.life.working() or device.life.personalise.is_set():
        return "the device is at work on its student"
    if not device.runtime.affordable:
        return "the privacy budget is spent"
    if stored < FEWEST_CLIPS:
        return f"{FEWEST_CLIPS} clips are needed, and {stored} are here"
    return ""


@request(changes=False)
def student(device: Device) -> dict[str, Any]:
    """Return the student in use: its folder, classes and input, after its files were compared with its manifest."""
    student_id = device.agent.active_id
    if not student_id:
        raise WrongState(f"{device.state.root} has no student yet; 'isthmus edge run' fetches it")
    slot = slot_of(device) if device.runtime is None else device.runtime.slot
    installed = slot.checked(student_id)
    manifest = installed.manifest
    return {
        "student": student_id,
        "kind": manifest.kind,
        "folder": str(installed.folder.resolve()),
        "classes": list(manifest.classes),
        "input_spec_json": manifest.input_spec_json,
    }
