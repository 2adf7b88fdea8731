"""Requests of other processes to a device: the running device answers them, or if none runs, its state folder does.

To add a request, write one function in this file and decorate it with ``@request``. Its name is the request's name. Its
first parameter is the ``Device``; the others are the arguments, each a ``str``, ``int``, ``float``, ``bool`` or
``list``, checked before the call. It returns what JSON can hold, and raises an IsthmusError to refuse. A command then
calls ``ask(device, "name", argument=value)``. If a request needs something else of the running process, that becomes
another field of ``Device``.
"""

import inspect
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeVar, get_type_hints

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.life import Life
from isthmus.edge.agent.runtime import Runtime, roll_back
from isthmus.edge.behaviour.step import State
from isthmus.edge.link.sent import SentMessages
from isthmus.edge.own_clips import budget as budgets
from isthmus.edge.own_clips.person import Person
from isthmus.edge.own_clips.personal import Personal, person_facts
from isthmus.edge.own_clips.store import ClipStore
from isthmus.edge.requests import shown
from isthmus.edge.requests.local_socket import MOST_ANSWER_BYTES, LocalSocket, call
from isthmus.edge.student.slot import StudentSlot
from isthmus.edge.student.trial import try_student
from isthmus.proto.errors import Corrupt, Internal, InvalidInput, IsthmusError, WrongState, from_status

log = logging.getLogger(__name__)

SENT: Final = "sent.sqlite"
"""The list of sent messages in the state folder."""

FEWEST_CLIPS: Final = 6
"""A personalisation on request needs so many clips."""

MOST_LISTED: Final = 200
MOST_SHOWN_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class Device:
    """What a request works on: the state folder, and the runtime and its life if this process runs the device."""

    state: DeviceState
    runtime: Runtime | None = None
    life: Life | None = None

    @property
    def store(self) -> ClipStore:
        """The clips that the device has captured."""
        return ClipStore(self.state.root / "clips")

    @property
    def agent(self) -> State:
        """The agent's state, of the running device or from the folder."""
        return self.state.agent() if self.runtime is None else self.runtime.state


@dataclass(frozen=True)
class _Request:
    function: Callable[..., dict[str, Any]]
    changes: bool
    arguments: Mapping[str, Any]
    needed: frozenset[str]


_TABLE: dict[str, _Request] = {}
_one_change = threading.Lock()

_Function = TypeVar("_Function", bound=Callable[..., dict[str, Any]])


def request(*, changes: bool) -> Callable[[_Function], _Function]:
    """Add the decorated function to the table.

    ``changes``: it writes to the folder, so it runs alone, and holds the folder if no process runs the device.
    """

    def add(function: _Function) -> _Function:
        hints = get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        _TABLE[function.__name__] = _Request(
            function,
            changes,
            {each.name: hints[each.name] for each in parameters},
            frozenset(each.name for each in parameters if each.default is each.empty),
        )
        return function

    return add


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


@request(changes=True)
def share_state(device: Device) -> dict[str, Any]:
    """Return what is sent of how the user feels, and count it as sent; an empty object if nothing may be sent."""
    sharing = device.state.sharing()
    if not sharing.may_be_sent(time.time()):
        return {}
    content = json.dumps(sharing.message).encode()
    device.state.save_sharing(replace(sharing, sent=sharing.sent + 1, sent_bytes=sharing.sent_bytes + len(content)))
    with _messages(device) as messages:
        messages.note_state(content)
    return sharing.message


@request(changes=True)
def rollback(device: Device) -> dict[str, Any]:
    """Go back to the student that was in use before."""
    if device.runtime is not None:
        installed = device.runtime.rollback()
    else:
        installed, agent = roll_back(_slot(device), device.agent)
        device.state.save_agent(agent)
    return {"student": installed.manifest.student_id, "kind": installed.manifest.kind}


@request(changes=True)
def correct(device: Device, clip: str, label: str) -> dict[str, Any]:
    """Learn what the person said of a clip."""
    person, student_id = _person(device)
    before = person.reading(student_id)
    after = person.correct(student_id, clip, label, time.time())
    changed = _changed(device, person, student_id, before, after)
    return {"clip": clip, "label": label, "corrections": after.corrections, "changed": changed}


@request(changes=True)
def undo_correction(device: Device) -> dict[str, Any]:
    """Take back the newest correction."""
    person, student_id = _person(device)
    before = person.reading(student_id)
    gone, after = person.undo(student_id)
    changed = _changed(device, person, student_id, before, after)
    return {"clip": gone.clip, "label": gone.label, "corrections": after.corrections, "changed": changed}


@request(changes=True)
def question(device: Device, a_day: int = -1) -> dict[str, Any]:
    """Return the clip whose label would teach the device most. ``a_day`` of 0 or more sets how often it may ask."""
    person, student_id = _person(device)
    asked = person.question(student_id, time.time(), a_day=None if a_day < 0 else a_day)
    return {"clip": asked.clip, "guesses": dict(asked.guesses)}


@request(changes=True)
def delete_clips(device: Device, names: list, everything: bool) -> dict[str, Any]:  # type: ignore[type-arg]
    """Delete clips that the device has captured, and forget what was learned of them, in memory too."""
    gone = None if everything else {str(name) for name in names}
    store = device.store
    if gone is not None:
        store.check(sorted(gone))
    reader = _reader(device) if device.state.enrolment() is not None else None
    if reader is None:
        device.state.forget_clips(gone)
    else:
        reader.forget(gone)
    if device.life is not None:
        device.life.sent.forget_content()
    return {"deleted": store.delete_all() if gone is None else store.delete(sorted(gone))}


@request(changes=True)
def keep_clips(device: Device, names: list) -> dict[str, Any]:  # type: ignore[type-arg]
    """Keep clips beyond their time."""
    store = device.store
    store.check([str(name) for name in names])
    for name in names:
        store.keep(str(name))
    return {"kept": len(names)}


@request(changes=False)
def pause_capture(device: Device, paused: bool) -> dict[str, Any]:
    """Pause capture, or go on with it. A running device notices within one clip."""
    if paused:
        device.store.pause()
    else:
        device.store.resume()
    return {"paused": device.store.paused}


@request(changes=False)
def clips(device: Device) -> dict[str, Any]:
    """Return the clips that the device has captured, and whether capture is paused."""
    return shown.clips(device.store)


@request(changes=False)
def events(device: Device, after: int, wait_s: float) -> dict[str, Any]:
    """Return what happened since event ``after``; wait up to ``wait_s`` for it. No ``life``: no device runs."""
    if device.life is None:
        return {"life": None, "events": []}
    happenings = device.life.happenings
    return {"life": happenings.life, "events": happenings.after(after, wait_s)}


@request(changes=False)
def look(device: Device) -> dict[str, Any]:
    """Return what camera and microphone give just now; ``view`` None if they are closed."""
    view = None if device.life is None else device.life.view
    return {"view": None if view is None else view.look(), "paused": device.store.paused}


@request(changes=False)
def link(device: Device) -> dict[str, Any]:
    """Return what the device knows of its link; ``link`` None if it does not run, or has asked nothing yet."""
    if device.runtime is None or device.life is None or device.life.link is None:
        return {"link": None}
    return {"link": shown.link(device.life.link, device.runtime.clock())}


@request(changes=False)
def sent(device: Device, before: int, most: int) -> dict[str, Any]:
    """Return the newest messages that were sent, and the totals of all. ``before``: only those of a lower number."""
    path = device.state.root / SENT
    if device.life is None and not path.exists():
        return {"messages": [], "totals": {}, "unwritten": 0}
    with _messages(device) as messages:
        newest = [asdict(each) for each in messages.newest(before, min(max(most, 1), MOST_LISTED))]
        return {"messages": newest, "totals": messages.totals(), "unwritten": messages.unwritten}


@contextmanager
def _messages(device: Device) -> Iterator[SentMessages]:
    """Yield the list of sent messages: the running device's, or the folder's."""
    if device.life is not None:
        yield device.life.sent
        return
    messages = SentMessages(device.state.root / SENT)
    try:
        yield messages
    finally:
        messages.close()


@request(changes=False)
def sent_content(device: Device, number: int) -> dict[str, Any]:
    """Return the bytes of a sent message as hexadecimal digits, and its numbers."""
    if device.life is None:
        raise WrongState("the bytes of sent messages are in the memory of the running device, and none runs")
    content, numbers = device.life.sent.content(number)
    return {"number": number, "hex": content[:MOST_SHOWN_BYTES].hex(), "bytes": len(content), "numbers": numbers}


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
        "wait": _why_not(device),
        "busy": device.life is not None and device.life.working(),
    }
    with suppress(Corrupt, WrongState):  # A student that is damaged is fetched again; it does not hide the rest.
        person, student_id = _person(device)
        facts["user"] = shown.mine(device.state, person, student_id, agent.base_id)
    return facts


@request(changes=False)
def personalise(device: Device) -> dict[str, Any]:
    """Begin a personalisation with the clips that are here. Raises WrongState if that cannot be now."""
    why_not = _why_not(device)
    if why_not or device.life is None:
        raise WrongState(why_not)
    device.life.personalise.set()
    return {}


def _why_not(device: Device) -> str:
    """Return why no personalisation can begin now; "" if one can."""
    if device.runtime is None or device.life is None:
        return "the device does not run"
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


def _changed(
    device: Device, person: Person, student_id: str, before: Personal | None, after: Personal
) -> list[dict[str, str]]:
    """Return which of the remembered clips are answered differently now."""
    window = device.state.window(student_id)
    if before is None or window is None:
        return []
    classes = person.classes(student_id)
    return shown.changes(shown.answers(before, window, classes), shown.answers(after, window, classes))


def _person(device: Device) -> tuple[Person, str]:
    """Return the device's user and the student in use. Raises WrongState without one."""
    student_id = device.agent.active_id
    if not student_id:
        raise WrongState(f"{device.state.root} has no student yet; 'isthmus edge run' fetches it")
    return _reader(device) or Person(device.state, _slot(device)), student_id


def _reader(device: Device) -> Person | None:
    return None if device.runtime is None else device.runtime.clips.person


def _user(device: Device) -> dict[str, Any]:
    """Return what the device has learned of its user, in words and numbers."""
    agent = device.agent
    if not agent.active_id or device.state.enrolment() is None:
        return {"person": "", "corrections": 0}
    person = _reader(device) or Person(device.state, _slot(device))
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
        slot = _slot(device) if device.runtime is None else device.runtime.slot
        trial = slot.trial_of(device.agent.active_id)
        return "" if trial is None else f"{trial[0]} of {trial[1]} clips answered"
    return ""


def _slot(device: Device) -> StudentSlot:
    enrolment = device.state.enrolment()
    if enrolment is None:
        raise WrongState(f"{device.state.root}: this device has not enrolled yet, so it has no student")
    return StudentSlot(
        device.state.root / "students", enrolment.signing_public_key, try_student, device_id=enrolment.device_id
    )


def privacy(state: DeviceState) -> dict[str, float | int | None]:
    """Return the epsilon spent, the epsilon allowed and the rounds allowed. None means without a limit."""
    budget = state.budget()
    epsilon = None if budget is None or budget.epsilon is None or math.isinf(budget.epsilon) else budget.epsilon
    return {
        "epsilon_spent": budgets.spent(entry.epsilon for entry in state.ledger()),
        "epsilon_budget": epsilon,
        "rounds_allowed": None if budget is None else budget.rounds,
    }


def ask(state: DeviceState, name: str, /, **arguments: Any) -> dict[str, Any]:
    """Return the running device's answer to a request; if none runs, do what is asked on the folder.

    Raises what the request raises, what ``local_socket.call`` raises, and Locked if another process holds the folder
    without answering requests.
    """
    question = {"request": name, "arguments": arguments}
    line = call(state.root, json.dumps(question).encode())
    if line is None:
        wanted = _wanted(question)
        if not wanted[0].changes:
            return _perform(Device(state), *wanted)
        with state.held():
            return _perform(Device(state), *wanted)
    reply = _object(line)
    if isinstance(answer := reply.get("answer"), dict):
        return answer
    raise from_status(int(reply.get("code", Internal.code)), str(reply.get("message")), str(reply.get("error")))


@contextmanager
def answered(device: Device) -> Iterator[None]:
    """Answer requests of other processes during the block. The caller holds the folder. Raises as LocalSocket does."""
    with LocalSocket(device.state.root, lambda line: _reply(device, line)):
        yield


def _reply(device: Device, line: bytes) -> bytes:
    try:
        reply: dict[str, Any] = {"answer": _perform(device, *_wanted(_object(line)))}
    except IsthmusError as error:
        reply = {"error": type(error).__name__, "code": error.code, "message": str(error)}
    except Exception as error:
        log.exception("a request failed")
        message = f"the device failed to answer: {type(error).__name__}; its own output says more"
        reply = {"error": Internal.__name__, "code": Internal.code, "message": message}
    made = json.dumps(reply).encode()
    if len(made) > MOST_ANSWER_BYTES:
        reply = {"error": Internal.__name__, "code": Internal.code, "message": "the answer is too long to be sent"}
        made = json.dumps(reply).encode()
    return made


def _perform(device: Device, wanted: _Request, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if not wanted.changes:
        return wanted.function(device, **arguments)
    with _one_change:
        return wanted.function(device, **arguments)


def _wanted(question: Mapping[str, Any]) -> tuple[_Request, dict[str, Any]]:
    """Return the request that is asked for and its checked arguments. Raises InvalidInput."""
    name, arguments = question.get("request"), question.get("arguments", {})
    if not isinstance(name, str) or name not in _TABLE:
        raise InvalidInput(f"{name!r} is no request of this version; it knows {', '.join(sorted(_TABLE))}")
    wanted = _TABLE[name]
    if not isinstance(arguments, dict) or not wanted.needed <= arguments.keys() <= wanted.arguments.keys():
        raise InvalidInput(f"{name} takes the arguments: {', '.join(wanted.arguments) or 'none'}")
    for argument, value in arguments.items():
        kind = wanted.arguments[argument]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise InvalidInput(f"{name}: {argument} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return wanted, arguments


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise InvalidInput("a request is one line that holds a JSON object") from error
    if not isinstance(value, dict):
        raise InvalidInput("a request is one line that holds a JSON object")
    return value
