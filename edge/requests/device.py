"""What a request works on: a device, running or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.life import Life
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.state import State
from isthmus.edge.link.sent import SentMessages
from isthmus.edge.own_clips.person import Person
from isthmus.edge.own_clips.store import ClipStore
from isthmus.edge.student.slot import StudentSlot
from isthmus.edge.student.trial import try_student
from isthmus.proto.errors import WrongState

SENT: Final = "sent.sqlite"
"""The list of sent messages in the state folder."""


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


def person_of(device: Device) -> tuple[Person, str]:
    """Return the device's user and the student in use. Raises WrongState without one."""
    student_id = device.agent.active_id
    if not student_id:
        raise WrongState(f"{device.state.root} has no student yet; 'isthmus edge run' fetches it")
    return reader_of(device) or Person(device.state, slot_of(device)), student_id


def reader_of(device: Device) -> Person | None:
    """Return the running device's user; None if no process runs the device."""
    return None if device.runtime is None else device.runtime.clips.person


def slot_of(device: Device) -> StudentSlot:
    """Open the students of the folder. Raises WrongState if the device has not enrolled."""
    enrolment = device.state.enrolment()
    if enrolment is None:
        raise WrongState(f"{device.state.root}: this device has not enrolled yet, so it has no student")
    return StudentSlot(
        device.state.root / "students", enrolment.signing_public_key, try_student, device_id=enrolment.device_id
    )


@contextmanager
def messages_of(device: Device) -> Iterator[SentMessages]:
    """Yield the list of sent messages: the running device's, or the folder's."""
    if device.life is not None:
        yield device.life.sent
        return
    messages = SentMessages(device.state.root / SENT)
    try:
        yield messages
    finally:
        messages.close()
