"""A sample of the damage to both state folders; ``python -m tests.bench.damage`` tries every file with 50 bits."""

from pathlib import Path
from typing import Any

from tests.rigs.cloud.damage import CloudFolder, swept
from tests.rigs.edge.damage import DeviceFolder, sweep


def faults(outcomes: Any) -> list[str]:
    return [f"{name}: {what}" for name, seen in outcomes.items() for what in seen if "FAULT" in what]


def test_no_damaged_file_of_a_device_leads_to_a_traceback_or_another_answer(students: Any, tmp_path: Path) -> None:
    device = DeviceFolder(tmp_path / "device", students.cloud(), students.public_key)
    outcomes = sweep(device.root, tmp_path / "copies", 2, device.use)
    assert faults(outcomes) == []
    assert {"agent.json", "credentials.json", "habits.json", "outbox.sqlite"} <= outcomes.keys()
    of_final = outcomes["students/versions/final/local_head.onnx"]
    assert of_final == {"the base student answers": 5}
    assert outcomes["habits.json"] == {"refused by name": 5}, "another number would be another answer"


def test_no_damaged_file_of_a_cloud_leads_to_a_traceback_or_another_answer(rig: Any, tmp_path: Path) -> None:
    outcomes = swept(CloudFolder(rig), tmp_path / "copies", 1, ("isthmus.db", "signing_key", "database.id"))
    assert faults(outcomes) == []
    assert outcomes["signing_key"]["refused by name"] == 4
