"""Requests of those who watch a device: events, camera and microphone, the link, and the messages that were sent."""

from dataclasses import asdict
from typing import Any, Final

from isthmus.edge.requests import shown
from isthmus.edge.requests.device import SENT, Device, messages_of
from isthmus.edge.requests.table import request
from isthmus.proto.errors import WrongState

MOST_LISTED: Final = 200
MOST_SHOWN_BYTES: Final = 64 << 10


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
    return {"link": shown.link(device.life.link, device.runtime.clock(), asks=device.runtime.config.ask_cloud)}


@request(changes=False)
def sent(device: Device, before: int, most: int) -> dict[str, Any]:
    """Return the newest messages that were sent, and the totals of all. ``before``: only those of a lower number."""
    path = device.state.root / SENT
    if device.life is None and not path.exists():
        return {"messages": [], "totals": {}, "unwritten": 0}
    with messages_of(device) as messages:
        newest = [asdict(each) for each in messages.newest(before, min(max(most, 1), MOST_LISTED))]
        return {"messages": newest, "totals": messages.totals(), "unwritten": messages.unwritten}


@request(changes=False)
def sent_content(device: Device, number: int) -> dict[str, Any]:
    """Return the bytes of a sent message as hexadecimal digits, and its numbers."""
    if device.life is None:
        raise WrongState("the bytes of sent messages are in the memory of the running device, and none runs")
    content, numbers = device.life.sent.content(number)
    return {"number": number, "hex": content[:MOST_SHOWN_BYTES].hex(), "bytes": len(content), "numbers": numbers}
