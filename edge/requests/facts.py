"""Requests for facts about a device and what it has learned of its user."""

import math
import os
from contextlib import suppress
from typing import Any

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.own_clips import budget as budgets
from isthmus.edge.own_clips.person import Person
from isthmus.edge.own_clips.personal import person_facts
from isthmus.edge.requests import shown
from isthmus.edge.requests.device import Device, person_of, reader_of, slot_of
from isthmus.edge.requests.student import why_not
from isthmus.edge.requests.table import request
from isthmus.proto.errors import Corrupt, WrongState


@request(changes=False)
def status(device: Device) -> dict[str, Any]:
    """Return the facts about the device that a person asks for."""
    agent, ledger, enrolment = device.agent, device.state.ledger(), device.state.enrolment()
    waits_s, waits_for = (None, "") if device.runtime is None else device.runtime.pause()
    return {
        "device_id": "" if enrolment is None else enrolment.device_id,
        "running": None if device.runtime is None else os.getpid(),
        "phase": agent.phase.value,
        "waits_s": waits_s,
        "waits_for": waits_for,
        "round": agent.round,
        "job_id": agent.job_id,
        "student": agent.active_id,
        "student_on_trial": _on_trial(device),
        "base_student": agent.base_id,
        "verdict": agent.verdict,
        "refused_student": agent.refused_id,
        "failure": agent.failure,
        **_user(device),
        "uploads": len(ledger),
        "uploaded_bytes": sum(entry.message_bytes for entry in ledger),
        "smallest_prototype": min((entry.smallest for entry in ledger), default=None),
        "shares_state": device.state.sharing().allowed,
        "states_sent": device.state.sharing().sent,
        **privacy(device.state),
    }


@request(changes=False)
def mine(device: Device) -> dict[str, Any]:
    """Return what the device has learned of its user, and what became of the last personalisation."""
    agent = device.agent
    facts: dict[str, Any] = {
        "student": agent.active_id,
        "base_student": agent.base_id,
        "phase": agent.phase.value,
        "failure": agent.failure,
        "refused_student": agent.refused_id,
        "guard": shown.verdict(device.state.verdict()),
        "uploads": len(device.state.ledger()),
        **privacy(device.state),
        "user": None,
        "wait": why_not(device),
        "busy": device.life is not None and device.life.working(),
    }
    with suppress(Corrupt, WrongState):  # A student that is damaged is fetched again; it does not hide the rest.
        person, student_id = person_of(device)
        facts["user"] = shown.mine(device.state, person, student_id, agent.base_id)
    return facts


def privacy(state: DeviceState) -> dict[str, float | int | None]:
    """Return the epsilon spent, the epsilon allowed and the rounds allowed. None means without a limit."""
    budget = state.budget()
    epsilon = None if budget is None or budget.epsilon is None or math.isinf(budget.epsilon) else budget.epsilon
    return {
        "epsilon_spent": budgets.spent(entry.epsilon for entry in state.ledger()),
        "epsilon_budget": epsilon,
        "rounds_allowed": None if budget is None else budget.rounds,
    }


def _user(device: Device) -> dict[str, Any]:
    """Return what the device has learned of its user, in words and numbers."""
    agent = device.agent
    if not agent.active_id or device.state.enrolment() is None:
        return {"person": "", "corrections": 0}
    person = reader_of(device) or Person(device.state, slot_of(device))
    reading = person.reading(agent.active_id)
    words = ""
    with suppress(Corrupt, WrongState):  # A student that is damaged is fetched again; it does not hide the rest.
        words = "" if reading is None else " ".join(person_facts(reading, person.classes(agent.active_id)).sentences)
    return {
        "person": words,
        "corrections": len(person.said().corrections),
    }


def _on_trial(device: Device) -> str:
    """Return how far a new student has come towards counting as good, "" if it does."""
    if not device.agent.active_id or device.state.enrolment() is None:
        return ""
    with suppress(Corrupt):  # A damaged record does not hide the rest; a run names it.
        slot = slot_of(device) if device.runtime is None else device.runtime.slot
        trial = slot.trial_of(device.agent.active_id)
        return "" if trial is None else f"{trial[0]} of {trial[1]} clips answered"
    return ""
