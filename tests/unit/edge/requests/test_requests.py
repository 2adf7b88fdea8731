"""Requests to a running device, in this process and in another one, and to a folder that no process runs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.state import Phase, State
from isthmus.edge.commands.edge import app
from isthmus.edge.link.interface import MemoryLink
from isthmus.edge.requests import table
from isthmus.edge.requests.device import Device
from isthmus.edge.requests.local_socket import call
from isthmus.edge.requests.requests import answered, ask
from isthmus.edge.student.download import Tally, fetch_student
from isthmus.edge.student.slot import StudentSlot
from isthmus.proto.errors import Internal, InvalidInput, Locked, WrongState
from tests.rigs.edge.device import load_test

RUNNING = """
import sys
from pathlib import Path
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.requests.device import Device
from isthmus.edge.requests.requests import answered
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
device = DeviceState(Path(sys.argv[1]))
runtime = Runtime(RunConfig("kiosk"), device, GrpcLink(open_channel("127.0.0.1:1")), ())
with device.held(), answered(Device(device, runtime)):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def device(students: Any, tmp_path: Path) -> DeviceState:
    """A device in the middle of a job, with two students, ``final`` in use."""
    cloud = students.cloud()
    device = DeviceState(tmp_path / "device")
    device.save_enrolment(cloud.enrolment)
    device.save_agent(State(phase=Phase.WATCH, job_id="job-1", active_id="final", base_id="base"))
    slot = StudentSlot(device.root / "students", students.public_key, load_test)
    link = MemoryLink(cloud)
    link.authenticate("token-1")
    for student_id in ("base", "final"):
        fetch_student(link, slot, student_id, lambda here, total: None, Tally())
        slot.verify(student_id)
        slot.activate(student_id)
    return device


@pytest.fixture
def running(students: Any, device: DeviceState) -> Iterator[Runtime]:
    """The device, run by this process."""
    runtime = Runtime(RunConfig("kiosk"), device, MemoryLink(students.cloud()), ())
    with device.held(), answered(Device(device, runtime)):
        yield runtime
    runtime.close()


def test_another_process_runs_the_device(device: DeviceState) -> None:
    def edge(command: str, *options: str) -> str:
        result = CliRunner().invoke(app, [command, "--state", str(device.root), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    command = [sys.executable, "-c", RUNNING, str(device.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            facts = json.loads(edge("status", "--json"))
            assert (facts["running"], facts["phase"], facts["student"]) == (process.pid, "watch", "final")
            assert "student base (base)" in edge("rollback")
            assert DeviceState(device.root).agent() == replace(device.agent(), active_id="base")
        finally:
            process.send_signal(signal.SIGKILL)
    assert json.loads(edge("status", "--json"))["running"] is None, "it works on the folder now"
    assert "student final (final)" in edge("rollback")


def test_a_rollback_while_the_device_runs(running: Runtime, device: DeviceState) -> None:
    assert ask(device, "rollback") == {"student": "base", "kind": "base"}
    assert running.state == replace(device.agent(), active_id="base")
    assert running.state.phase is Phase.WATCH, "the job goes on"
    for changes in ({"phase": Phase.SWAP}, {"repair_id": "final"}):
        running.state = replace(running.state, **changes)  # type: ignore[arg-type]
        with pytest.raises(WrongState, match="is replacing its student"):
            ask(device, "rollback")


def test_a_rollback_that_was_killed_half_way_is_not_taken_back(device: DeviceState, students: Any) -> None:
    StudentSlot(device.root / "students", students.public_key, load_test).rollback()  # and the agent was not saved
    assert ask(device, "rollback")["student"] == "base"


def test_status_says_what_a_running_device_waits_for(running: Runtime, device: DeviceState) -> None:
    assert ask(device, "status")["waits_s"] is None
    seen: list[Any] = []
    running._sleep = lambda seconds: seen.append(ask(device, "status"))
    running._trouble = "the cloud cannot be reached"
    running._wait(running.clock() + 50)
    assert 0 < seen[0]["waits_s"] <= 50
    assert seen[0]["waits_for"] == "the cloud cannot be reached"
    assert seen[0]["running"] == os.getpid()


def test_a_process_that_holds_the_folder_without_a_socket(device: DeviceState) -> None:
    with device.held():
        assert ask(device, "status")["phase"] == "watch"
        with pytest.raises(Locked, match=str(os.getpid())):
            ask(device, "rollback")


GARBAGE = (
    b"",
    b"\xff\x00\x80",
    b"[]",
    b"[" * 60_000,
    b'{"request": 5}',
    b'{"request": "erase"}',
    b'{"request": "__init__"}',
    b'{"request": "status", "arguments": 5}',
    b'{"request": "status", "arguments": {"state": "/"}}',
    b'{"request": "status", "arguments": {"x": ' + b"9" * 9_000 + b"}}",
)


def test_garbage_is_refused_and_changes_nothing(running: Runtime, device: DeviceState) -> None:
    before = device.agent()
    for line in GARBAGE:
        reply = json.loads(call(device.root, line) or b"")
        assert (reply["error"], reply["code"]) == ("InvalidInput", 3), line
        assert len(reply["message"]) < 300
    assert device.agent() == before


def test_a_request_is_one_function(
    running: Runtime, device: DeviceState, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))

    @table.request(changes=False)
    def repeat(device: Device, text: str, times: float = 2.0) -> dict[str, Any]:
        return {"repeated": text * int(times), "found": 1 / (3 - times)}

    assert ask(device, "repeat", text="ab") == {"repeated": "abab", "found": 1.0}
    for wrong in ({}, {"text": 5}, {"text": "a", "times": True}, {"text": "a", "more": 1}):
        with pytest.raises(InvalidInput, match="repeat"):
            ask(device, "repeat", **wrong)
    with pytest.raises(Internal, match="ZeroDivisionError"):
        ask(device, "repeat", text="a", times=3)
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(Internal, match="too long"):
        ask(device, "repeat", text="a" * 1000, times=2000)
