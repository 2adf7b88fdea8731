"""Requests about the clips that the device captures."""

from typing import Any

from isthmus.edge.requests import shown
from isthmus.edge.requests.device import Device, reader_of
from isthmus.edge.requests.table import request


@request(changes=False)
def clips(device: Device) -> dict[str, Any]:
    """Return the clips that the device has captured, and whether capture is paused."""
    return shown.clips(device.store)


@request(changes=True)
def delete_clips(device: Device, names: list, everything: bool) -> dict[str, Any]:  # type: ignore[type-arg]
    """Delete clips that the device has captured, and forget what was learned of them, in memory too."""
    gone = None if everything else {str(name) for name in names}
    store = device.store
    if gone is not None:
        store.check(sorted(gone))
    reader = reader_of(device) if device.state.enrolment() is not None else None
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
