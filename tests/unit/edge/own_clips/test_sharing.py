"""What a device says of how its user feels: nothing without consent, then one class and one rounded probability."""

import time
from pathlib import Path

import numpy as np
import pytest

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.inference import Answer
from isthmus.edge.commands.replying import note_answer, take_consent
from isthmus.edge.own_clips.sharing import FRESH_S
from isthmus.edge.requests.requests import ask
from isthmus.proto.errors import Corrupt

CLASSES = ("NEU", "SAD")
SAD = Answer(np.array([0.17, 0.83], np.float32))


@pytest.fixture
def device(tmp_path: Path) -> DeviceState:
    return DeviceState(tmp_path / "device")


def test_without_consent_nothing_is_kept_or_sent(device: DeviceState) -> None:
    take_consent(device, allowed=False)
    note_answer(device, CLASSES, SAD)
    assert not (device.root / "sharing.json").exists()
    assert ask(device, "share_state") == {}
    facts = ask(device, "status")
    assert (facts["shares_state"], facts["states_sent"]) == (False, 0)


def test_with_consent_the_newest_answer_is_sent_rounded_and_counted(device: DeviceState) -> None:
    take_consent(device, allowed=True)
    assert ask(device, "share_state") == {}, "there is no answer yet"
    note_answer(device, CLASSES, SAD)
    assert ask(device, "share_state") == {"class": "SAD", "probability": 0.8}
    note_answer(device, CLASSES, Answer(None, error="too late"))
    note_answer(device, CLASSES, Answer(np.array([0.96, 0.04], np.float32)))
    assert ask(device, "share_state") == {"class": "NEU", "probability": 1.0}
    assert ask(device, "status")["states_sent"] == 2
    listed = ask(device, "sent", before=0, most=9)
    assert [each["name"] for each in listed["messages"]] == ["SharedState"] * 2
    assert "SAD" not in str(listed), "what was said is not in the table"
    assert device.sharing().sent_bytes == len('{"class": "SAD", "probability": 0.8}') + len(
        '{"class": "NEU", "probability": 1.0}'
    )


def test_consent_that_is_taken_back_erases_the_state_and_keeps_the_count(device: DeviceState) -> None:
    take_consent(device, allowed=True)
    note_answer(device, CLASSES, SAD)
    ask(device, "share_state")
    take_consent(device, allowed=False)
    assert "SAD" not in (device.root / "sharing.json").read_text()
    assert ask(device, "share_state") == {}
    assert ask(device, "status")["states_sent"] == 1


def test_an_old_state_is_not_sent(device: DeviceState, monkeypatch: pytest.MonkeyPatch) -> None:
    take_consent(device, allowed=True)
    note_answer(device, CLASSES, SAD)
    later_s = time.time() + FRESH_S + 1
    monkeypatch.setattr("time.time", lambda: later_s)
    assert ask(device, "share_state") == {}


def test_a_damaged_file_is_no_consent(device: DeviceState) -> None:
    take_consent(device, allowed=True)
    file = device.root / "sharing.json"
    file.write_text(file.read_text().replace("true", "1   "))
    with pytest.raises(Corrupt):
        ask(device, "share_state")
    take_consent(device, allowed=False)
    assert ask(device, "share_state") == {}
