"""The work of ``isthmus edge reply``, and the newest answer that it may send if the person allows it."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import typer

from isthmus.chat_client import ChatServer
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.inference import Answer
from isthmus.edge.own_clips.sharing import Sharing, consented, noted
from isthmus.edge.requests.requests import ask
from isthmus.proto.errors import Corrupt


def take_consent(device: DeviceState, *, allowed: bool) -> None:
    """Keep what the person allows from now on. A file that is damaged holds no consent."""
    try:
        before = device.sharing()
    except Corrupt:
        device.save_sharing(consented(Sharing(), allowed=allowed))
        return
    after = consented(before, allowed=allowed)
    if after != before:
        device.save_sharing(after)


def note_answer(device: DeviceState, classes: tuple[str, ...], answer: Answer) -> None:
    """Keep what the answer shows of how the user feels, if the person allows it to be sent."""
    sharing = device.sharing()
    if sharing.allowed and answer.probabilities_C is not None:
        device.save_sharing(noted(sharing, classes, answer.probabilities_C, time.time()))


def note_newest(device: DeviceState, report: Mapping[str, Any]) -> None:
    """Keep what the last answered clip of a run's report shows."""
    known = [shares for clip in report["predictions"] if (shares := clip["probabilities"]["local"]) is not None]
    if known:
        note_answer(device, tuple(report["classes"]), Answer(np.asarray(known[-1], np.float32)))


def reply(
    text: str,
    address: str,
    state: Path,
    *,
    max_tokens: int,
    seed: int | None,
    key_file: Path | None,
    tls_cert: Path | None,
    as_json: bool,
) -> None:
    """Print the reply. Raises IsthmusError or ValueError; ends the command if the server refuses."""
    if not state.is_dir():
        raise ValueError(f"{state} is no folder of a device: 'isthmus edge run --state {state} ...' makes one")
    server = ChatServer(address, key_file, tls_cert)
    emotion = ask(DeviceState(state), "share_state") or None
    words = "nothing of how you feel" if emotion is None else json.dumps(emotion)
    print(f"sent with the text: {words}", file=sys.stderr)
    pieces = server.reply([{"role": "user", "content": text}], max_tokens=max_tokens, seed=seed, emotion=emotion)
    if as_json:
        typer.echo(json.dumps({"text": text, "sent": emotion, "reply": "".join(pieces), "server": server.times}))
        return
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
