"""The device's command: its output and its refusals."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from isthmus.edge.agent.device_state import DeviceState, LedgerEntry
from isthmus.edge.behaviour.state import Phase, State
from isthmus.edge.commands import forgetting
from isthmus.edge.commands.edge import app
from isthmus.edge.commands.terminal import plain
from isthmus.edge.link.interface import MemoryLink
from isthmus.edge.own_clips.budget import Budget
from isthmus.edge.student.download import Tally, fetch_student
from isthmus.edge.student.slot import StudentSlot
from tests.rigs.edge.device import load_test


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def state(students: Any, tmp_path: Path) -> Path:
    """A device with two students, the final one in use, that has sent once."""
    cloud = students.cloud()
    device = DeviceState(tmp_path / "device")
    device.save_enrolment(cloud.enrolment)
    device.save_agent(State(phase=Phase.SERVE, active_id="final", base_id="base"))
    device.add_to_ledger(LedgerEntry("k", 0, "prototypes", 2, 4, (4, 5), 60, 1.5, 0.0))
    slot = StudentSlot(device.root / "students", students.public_key, load_test)
    link = MemoryLink(cloud)
    link.authenticate("token-1")
    for student_id in ("base", "final"):
        fetch_student(link, slot, student_id, lambda here, total: None, Tally())
        slot.verify(student_id)
        slot.activate(student_id)
    return device.root


def test_status(state: Path) -> None:
    facts = json.loads(call("status", "--state", state, "--json").output)
    assert (facts["device_id"], facts["phase"], facts["student"]) == ("device-1", "serve", "final")
    assert facts["student_on_trial"] == "0 of 20 clips answered"
    assert (facts["uploaded_bytes"], facts["smallest_prototype"], facts["epsilon_spent"]) == (60, 4, 1.5)
    shown = call("status", "--state", state)
    assert shown.exit_code == 0
    assert "token-1" not in shown.output


def test_rollback_and_back(state: Path) -> None:
    assert "student base (base)" in call("rollback", "--state", state).output
    assert DeviceState(state).agent().active_id == "base"
    assert "student final (final)" in call("rollback", "--state", state).output


def test_a_state_that_is_not_there(tmp_path: Path) -> None:
    for command in ("status", "rollback"):
        refused = call(command, "--state", tmp_path / "nowhere")
        assert refused.exit_code == 1
        assert "is no folder of a device" in refused.stderr
    (tmp_path / "empty").mkdir()
    refused = call("rollback", "--state", tmp_path / "empty")
    assert "has not enrolled yet" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ratios", "1,x"], 2, "'x' is not a number"),
        (["--ratios", "2,2"], 2, "twice"),
        (["--min-cluster", "0"], 2, "min-cluster"),
        (["--selection-clips", "names.txt"], 1, "go together"),
        (["--layout", "nonsense"], 2, "'nonsense' is not one of"),
        (["--cloud", "far.example:1"], 1, "has neither the CREMA-D layout"),
    ],
)
def test_run_refuses_in_one_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    result = call("run", "--cloud", "127.0.0.1:1", "--state", tmp_path / "s", "--data", data, "--once", *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert len(result.stderr.strip().splitlines()) == 1


def test_status_shows_the_budget(state: Path) -> None:
    DeviceState(state).save_budget(Budget(3, 4.5, chosen=True))
    facts = json.loads(call("status", "--state", state, "--json").output)
    assert (facts["epsilon_spent"], facts["epsilon_budget"], facts["rounds_allowed"]) == (1.5, 4.5, 3)


def test_text_from_outside_is_shown_plainly(state: Path) -> None:
    device = DeviceState(state)
    device.save_agent(replace(device.agent(), failure="[/red]\x1b[2J\nisthmus edge: all is well"))
    shown = call("status", "--state", state).output
    assert "\x1b" not in shown
    assert "[/red]\\x1b[2J\\nisthmus" in "".join(shown.split())
    assert plain("a\u202eb") == "a\\u202eb"


def test_a_second_process_is_told_who_holds_the_folder(state: Path) -> None:
    with DeviceState(state).held():
        refused = call("rollback", "--state", state)
    assert refused.exit_code == 1
    assert f"process {os.getpid()} runs the device" in refused.stderr
    assert call("rollback", "--state", state).exit_code == 0, "the folder is free again"


def test_forgetting_needs_a_device_and_a_choice(state: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "ada.jpg").write_bytes(b"picture")
    refused = call("forget", "--state", tmp_path / "photos", "--only-here")
    assert (refused.exit_code, (tmp_path / "photos" / "ada.jpg").exists()) == (1, True)
    assert "no folder of a device" in refused.stderr
    for options in ([], ["--only-here", "--cloud", "127.0.0.1:1"]):
        assert call("forget", "--state", state, *options).exit_code == 2
    with DeviceState(state).held():
        assert call("forget", "--state", state, "--only-here").exit_code == 1
    gone = call("forget", "--state", state, "--cloud", "127.0.0.1:1")
    assert (gone.exit_code, "cannot be reached" in gone.stderr) == (1, True)
    assert DeviceState(state).enrolment() is not None, "as long as the cloud has not erased it, nothing is erased"
    assert call("forget", "--state", state, "--only-here").exit_code == 0
    assert list(state.iterdir()) == []


def test_a_person_of_a_shared_device_is_forgotten_alone(state: Path) -> None:
    for name in ("anna", "ben"):
        shutil.copytree(state, state / "people" / name, symlinks=True, ignore=shutil.ignore_patterns("people"))
    unknown = call("forget", "--state", state, "--person", "carl", "--only-here")
    assert unknown.exit_code == 1
    assert not (state / "people" / "carl").exists()
    with DeviceState(state / "people" / "anna").held():
        assert call("forget", "--state", state, "--person", "anna", "--only-here").exit_code == 1
    assert call("forget", "--state", state, "--person", "anna", "--only-here").exit_code == 0
    assert [path.name for path in (state / "people").iterdir()] == ["ben"]
    assert DeviceState(state).enrolment() is not None
    assert call("forget", "--state", state, "--only-here").exit_code == 0
    assert list(state.iterdir()) == [], "everybody's part, if no person is named"


def test_everybody_of_a_shared_device_is_forgotten_in_the_cloud(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(state, state.with_name("anna"))  # Nobody uses the shared device without a name.
    (state / "people").mkdir(parents=True)
    shutil.move(state.with_name("anna"), state / "people" / "anna")
    told: list[str] = []
    monkeypatch.setattr(forgetting, "_forget_in", lambda cloud, known_as, device_id, token: told.append(device_id))
    assert call("forget", "--state", state, "--cloud", "127.0.0.1:1").exit_code == 0
    assert told == ["device-1"]
    assert list(state.iterdir()) == []


def test_enrolling_twice_needs_again(state: Path) -> None:
    refused = call("enrol", "--state", state, "--cloud", "127.0.0.1:1")
    assert refused.exit_code == 1
    assert "--again" in refused.stderr


@pytest.mark.parametrize("name", ["credentials.json", "agent.json", "ledger.json", "budget.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "noise", "folder", "other"])
def test_a_damaged_file_is_named_in_one_line(state: Path, name: str, damage: str) -> None:
    DeviceState(state).save_budget(Budget(3))
    path = state / name
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        replaced = {"empty": b"", "half": content[: len(content) // 2], "noise": b"\xff\x00" * 40, "other": b"[1]"}
        path.write_bytes(replaced[damage])
    refused = call("status", "--state", state)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert str(path) in refused.stderr
    assert "move it away" in refused.stderr
