"""The tutorials run as they are printed, from first to last block, in folders of their own."""

import json
import time
from pathlib import Path

import pytest

from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.requests.requests import ask
from tests.rigs.project import commands
from tests.rigs.project.protobuf import TOO_NEW_FOR_TRITON, WHY
from tests.rigs.project.tutorial import Tutorial

pytestmark = [pytest.mark.tutorial, pytest.mark.timeout(3600)]


def test_a_release_is_trained_and_devices_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Tutorial(tmp_path) as tutorial:
        tutorial.run("cloud.md")
        tutorial.run("device.md")
        tutorial.run("laptop.md")
        laptop = DeviceState(Path("laptop"))
        while ask(laptop, "mine")["wait"]:  # the page's button is pressed as soon as it can be
            time.sleep(0.2)
        code, printed = commands.ended(["edge", "clips", "list", "--state", "laptop"])
        assert code == 0 and "sound and picture" in printed, printed
        ask(laptop, "personalise")
        while (asked := commands.ended(["edge", "ask", "--json", "--state", "laptop"]))[0]:
            assert "cannot learn from corrections yet" in asked[1], asked[1]
            time.sleep(0.5)
        code, printed = commands.ended(["edge", "correct", json.loads(asked[1])["clip"], "SAD", "--state", "laptop"])
        assert code == 0, printed


@pytest.mark.skipif(TOO_NEW_FOR_TRITON, reason=WHY)
def test_an_image_task_is_served_and_its_model_warmed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Tutorial(tmp_path) as tutorial:
        tutorial.run("elastic-serving.md")
        tutorial.run("warm-up.md")


def test_an_experiment_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Tutorial(tmp_path) as tutorial:
        tutorial.run("experiments.md")
