"""The load generator against a real server: devices' calls and streams, beside an echo, and refusals."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.cloud.commands.load.options import Load
from isthmus.cloud.commands.load.running import load
from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.proto.errors import InvalidInput, IsthmusError


def loaded(rig: Any, out: Path, server: dict[str, object] | None = None, **options: Any) -> dict[str, Any]:
    """Run the command against a new server; return what it writes."""

    async def scenario() -> None:
        async with rig.running(**(server or {})) as (running, _):
            given = Load(f"127.0.0.1:{running.port}", duration_s=0.2, **options)
            await asyncio.to_thread(load, given, out)

    asyncio.run(scenario())
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_devices_and_an_echo_get_the_same_load(rig: Any, tmp_path: Path) -> None:
    found = loaded(rig, tmp_path / "out", what="frames", connections=2, in_flight="1,4", rate="40", echo=True)
    assert [(row["target"], row.get("in_flight"), row.get("rate_per_s")) for row in found["rows"]] == [
        (target, *load) for target in ("server", "echo") for load in ((1, None), (4, None), (None, 40.0))
    ]
    for row in found["rows"]:
        assert row["errors"] == {} and row["sent"] > 0
        assert row["latency_ms"]["p50"] > 0 and row["answered_per_s"] >= row["goodput_per_s"] > 0
    assert len(devices.listing(Database(rig.settings().database_url))) == 3, "one for each connection, one for the echo"


def test_errors_are_counted_by_their_name(rig: Any, tmp_path: Path) -> None:
    found = loaded(
        rig, tmp_path / "out", {"max_calls_per_device": 1}, what="device", connections=1, in_flight="16", timeout_s=5.0
    )
    (row,) = found["rows"]
    assert row["errors"].keys() == {"Busy"} and row["sent"] > row["errors"]["Busy"]


def test_a_wrong_key_and_a_server_that_is_not_there_are_one_error(rig: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("wrong")
    (tmp_path / "right").write_text("right")
    with pytest.raises(IsthmusError, match="enrolment key"):
        loaded(
            rig,
            tmp_path / "out",
            {"enrolment_key_file": tmp_path / "right"},
            what="device",
            key_file=key,
            rate="10",
        )
    with pytest.raises(InvalidInput, match="needs --task, and either --image or --data"):
        load(Load("127.0.0.1:1", rate="10"), None)
    for wrong in ({}, {"trace": tmp_path, "in_flight": "1"}):
        with pytest.raises(ValueError, match="--rate"):
            Load("127.0.0.1:1", **wrong)
