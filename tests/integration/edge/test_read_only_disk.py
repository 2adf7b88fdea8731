"""A state folder on a disk that can only be read: one line for a person at the start, and answers while it lasts."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.cli import main
from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.behaviour.state import State
from isthmus.edge.own_clips.store import ClipStore
from isthmus.proto.errors import StorageFull


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that can be made read-only by mounting it again."""
    folder = tmp_path / "card"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False).returncode:
        pytest.skip("only root can mount a disk that can only be read")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def only_read(card: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", card], check=True)


def test_a_memory_card_that_fails_while_the_device_runs(card: Path) -> None:
    device, store = DeviceState(card / "device"), ClipStore(card / "device" / "clips")
    device.save_agent(State(active_id="base"))
    name = store.add(np.full(16_000, 0.1, np.float32), None, InputSpec())
    only_read(card)
    for write in (
        lambda: store.add(np.full(16_000, 0.1, np.float32), None, InputSpec()),
        lambda: device.save_agent(State(active_id="other")),
        store.pause,
        lambda: store.keep(name),
    ):
        with pytest.raises(StorageFull, match="can only be read"):
            write()
    assert device.agent().active_id == "base" and [clip.name for clip in store.clips()] == [name]


@pytest.mark.parametrize("begun", [False, True], ids=["a new device", "a device"])
def test_a_device_that_starts_there_says_so_in_one_line(
    card: Path, begun: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if begun:
        DeviceState(card / "device").save_agent(State())
    only_read(card)
    words = ["edge", "run", "--cloud", "127.0.0.1:1", "--state", str(card / "device"), "--camera", "none"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--microphone", "none"])
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert len(error.strip().splitlines()) == 1
    assert "read-only" in error.lower() or "can only be read" in error
