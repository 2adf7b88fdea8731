"""The work of ``isthmus edge forget``: erase a device, or one person's part of a shared one, here and in the cloud."""

import contextlib
from pathlib import Path

import typer

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.commands.options import CloudOptions
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.edge.own_clips.store import person_folder
from isthmus.proto.errors import IsthmusError, Unauthenticated, WrongState


def forget(cloud: str, state: Path, known_as: CloudOptions, person: str) -> None:
    """Erase in the cloud, unless ``cloud`` is "", and here. Without ``person`` everybody's part is erased.

    A kill in between leaves a folder of which the same command erases the rest. Raises IsthmusError or ValueError.
    """
    root = person_folder(state, person) if person else state
    if not root.is_dir():
        raise ValueError(f"{root} is no folder of a device: 'isthmus edge run --state {state} ...' makes one")
    parts = [root] if person else [*sorted(path for path in (root / "people").glob("*") if path.is_dir()), root]
    devices = [device for device in map(DeviceState, parts) if device.exists()]
    if not devices:
        raise ValueError(f"{root} is no folder of a device, so nothing in it is deleted")
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(device.held())
        if cloud and not any(device.enrolment() is not None for device in devices):
            raise ValueError(f"{root}: this device has not enrolled, so no cloud knows it; give --only-here")
        for device in devices:
            enrolment = device.enrolment() if cloud else None
            if enrolment is not None:
                _forget_in(cloud, known_as, enrolment.device_id, enrolment.token)
            device.erase()
        DeviceState(root).erase()
    if person:
        root.rmdir()
    typer.echo(f"{root} is erased" if not cloud else f"{cloud} has erased this device, and {root} is erased")


def _forget_in(cloud: str, known_as: CloudOptions, device_id: str, token: str) -> None:
    channel = open_channel(cloud, tls=known_as.tls, tls_ca=known_as.tls_ca, own=known_as.own_certificate)
    with contextlib.closing(GrpcLink(channel)) as link:
        link.authenticate(token)
        try:
            link.forget()
        except (Unauthenticated, WrongState) as error:
            raise IsthmusError(
                f"{error}. Its operator can erase it: isthmus cloud devices --delete {device_id}. "
                "Afterwards give --only-here"
            ) from error
