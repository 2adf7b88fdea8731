"""What the device's page offers and refuses, asked of a running device and of a folder."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the page needs isthmus[page]")

from starlette.testclient import TestClient

from isthmus.data.transforms import InputSpec
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.life import Life
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.link.interface import MemoryLink
from isthmus.edge.link.sent import SentMessages
from isthmus.edge.own_clips.store import ClipStore
from isthmus.edge.page import watching
from isthmus.edge.page.app import device_page
from isthmus.edge.page.watching import Watching
from isthmus.edge.requests.device import Device
from isthmus.edge.requests.requests import answered
from isthmus.proto.errors import Busy
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.conftest import CLASSES
from tests.rigs.edge.device import load_test


@pytest.fixture
def running(students: Any, tmp_path: Path) -> Iterator[tuple[DeviceState, Life]]:
    """A device that has enrolled and runs in this process."""
    state = DeviceState(tmp_path / "device")
    state.save_enrolment(students.cloud().enrolment)
    life = Life(SentMessages(state.root / "sent.sqlite"))
    runtime = Runtime(RunConfig("kiosk"), state, MemoryLink(students.cloud()), ())
    with state.held(), answered(Device(state, runtime, life)):
        yield state, life
    runtime.close()
    life.sent.close()


@pytest.fixture
def page(running: tuple[DeviceState, Life]) -> TestClient:
    return TestClient(device_page(running[0], "kiosk"))


def do(page: TestClient, request: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
    reply = page.post("/api/do", json={"request": request, "arguments": arguments})
    return reply.status_code, reply.json()


def test_the_page_offers_its_requests_and_no_other(page: TestClient) -> None:
    assert do(page, "status")[1]["phase"] == "enrol"
    assert do(page, "mine")[1]["wait"] == "the first student is not here yet"
    for name in ("events", "look", "ask", "__class__"):
        assert do(page, name, after=0, wait_s=0.0) == (409, {"error": "the page offers no such request"})
    for body in (b"", b"[]", b"{}", b"nonsense", b'{"request": ["status"]}', b'{"request": "status", "arguments": 5}'):
        assert page.post("/api/do", content=body).status_code == 409, body
    assert do(page, "personalise") == (409, {"error": "the first student is not here yet"})


def test_what_was_sent_is_listed_with_its_bytes(page: TestClient, running: tuple[DeviceState, Life]) -> None:
    message = pb.WatchJobRequest(job_id="job-7")
    running[1].sent.note(message)
    (listed,) = do(page, "sent", before=0, most=10)[1]["messages"]
    assert (listed["name"], listed["size_bytes"]) == ("WatchJobRequest", message.ByteSize())
    assert bytes.fromhex(do(page, "sent_content", number=1)[1]["hex"]) == message.SerializeToString()
    do(page, "delete_clips", names=[], everything=True)
    assert do(page, "sent_content", number=1)[0] == 409, "deleting clips forgets the bytes"


def test_clips_are_seen_heard_kept_and_deleted(page: TestClient, running: tuple[DeviceState, Life]) -> None:
    store = ClipStore(running[0].root / "clips")
    spec = replace(InputSpec(), duration_s=0.5, sample_rate_hz=8000, window=256, hop=128, spectrogram_bins=8)
    spec = replace(spec, spectrogram_columns=8)
    pictures = [np.full((64, 64, 3), level, np.uint8) for level in (20, 120, 220)]
    name = store.add(np.full(4000, 0.1, np.float32), pictures, spec)
    heard_only = store.add(np.full(4000, 0.1, np.float32), None, spec)
    assert page.get(f"/api/clips/{name}/pictures.jpg").content.startswith(b"\xff\xd8")
    assert page.get(f"/api/clips/{name}/sound.wav").content.startswith(b"RIFF")
    assert page.get(f"/api/clips/{heard_only}/pictures.jpg").status_code == 409
    for other in ("20200101T000000-000", "..", "paused", "page-token"):
        assert page.get(f"/api/clips/{other}/sound.wav").status_code in (404, 409)
    assert do(page, "keep_clips", names=[name])[1] == {"kept": 1}
    assert do(page, "pause_capture", paused=True)[1] == {"paused": True}
    listed = do(page, "clips")[1]
    assert listed["paused"] and [(each["name"], each["kept"]) for each in listed["clips"]] == [
        (heard_only, False),
        (name, True),
    ]
    assert do(page, "delete_clips", names=[name, "another"], everything=False)[0] == 409
    assert do(page, "delete_clips", names=[name], everything=False)[1] == {"deleted": 1}
    assert [each["name"] for each in do(page, "clips")[1]["clips"]] == [heard_only]


def test_a_browser_gets_the_student_in_use_and_no_other_file(students: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the graphs need the package onnx")
    state = DeviceState(tmp_path / "device")
    page = TestClient(device_page(state, "kiosk"))
    assert page.get("/api/student").status_code == 409, "there is no student yet"
    assert page.get("/api/student/local_head.onnx").status_code == 409
    runtime = Runtime(RunConfig("kiosk"), state, MemoryLink(students.cloud()), (), trial=load_test)
    runtime.run(Phase.ENCODE)
    runtime.close()
    known = page.get("/api/student").json()
    assert (known["classes"], known["samples"]) == (list(CLASSES), students.spec.samples)
    assert known["name"] == "the base student of kiosk"
    files = students.files("base", 0)
    for name in ("audio_encoder", "visual_encoder", "local_head"):
        assert page.get(f"/api/student/{name}.onnx").content == files[f"{name}.onnx"]
        assert known["files"][name] == len(files[f"{name}.onnx"])
    for name in ("spectrogram", "picture"):
        content = page.get(f"/api/student/{name}.onnx").content
        onnx.checker.check_model(onnx.load_from_string(content))
        assert known["files"][name] == len(content)
    for name in ("teacher_head", "..%2fmanifest", "manifest", "compressor_r1", ""):
        assert page.get(f"/api/student/{name}.onnx").status_code in (404, 409), name
    (state.root / "students" / "current" / "local_head.onnx").write_bytes(b"damaged")
    damaged = page.get("/api/student")
    assert damaged.status_code == 503 and "do not match" in damaged.json()["error"]


async def heard(events: Any, wanted: int) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    async for text in events:
        kind, data = text.removesuffix("\n\n").split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        if len(found) == wanted:
            return found
    return found


def test_pages_hear_what_happens_and_are_told_that_a_device_ended(running: tuple[DeviceState, Life]) -> None:
    state, life = running
    life.happenings.note("withheld", reason="nobody here")

    async def watched() -> None:
        follow = Watching(state)
        first = follow.open(look=False)
        known = await heard(first, 2)
        assert [kind for kind, _ in known] == ["device", "hello"]
        assert known[0][1] == {"running": True, "problem": ""}
        assert [event["reason"] for event in known[1][1]] == ["nobody here"]
        second = follow.open(look=True)
        assert (await heard(second, 2))[1][1] == known[1][1], "a page that is opened twice knows the same"
        life.happenings.note("trouble", text="the camera is gone")
        for each in (first, second):
            kinds = [kind for kind, _ in await heard(each, 1)]
            assert kinds[0] in ("event", "look")
        await first.aclose()
        assert follow._tasks, "one page is left"
        await second.aclose()
        assert not follow._tasks, "nobody watches, so nothing is asked"

    asyncio.run(watched())


def test_a_page_says_that_no_device_runs_and_finds_it_again(
    students: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "AGAIN_S", 0.01)
    monkeypatch.setattr(watching, "WAIT_S", 0.2)
    state = DeviceState(tmp_path / "device")
    state.save_enrolment(students.cloud().enrolment)

    async def watched() -> None:
        events = Watching(state).open(look=False)
        assert (await heard(events, 2))[0] == ("device", {"running": False, "problem": ""})
        for start in range(2):
            life = Life(SentMessages(state.root / "sent.sqlite"))
            life.happenings.note("trouble", text=f"start {start}")
            runtime = Runtime(RunConfig("kiosk"), state, MemoryLink(students.cloud()), ())
            with answered(Device(state, runtime, life)):
                (_, device), (_, known) = await heard(events, 2)
                assert device["running"]
                assert [event["text"] for event in known] == [f"start {start}"]
            runtime.close()
            life.sent.close()
            assert (await heard(events, 2))[0][1]["running"] is False
        await events.aclose()

    asyncio.run(watched())


def test_no_more_pages_than_the_device_can_bear(tmp_path: Path) -> None:
    async def many() -> None:
        follow = Watching(DeviceState(tmp_path / "device"))
        opened = [follow.open(look=False) for _ in range(watching.MOST_PAGES)]
        with pytest.raises(Busy, match="close one"):
            follow.open(look=False)
        for each in opened:
            await heard(each, 1)
            await each.aclose()  # type: ignore[attr-defined]

    asyncio.run(many())
