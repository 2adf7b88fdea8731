"""A student on its way to a device over a real server: rounds that settle, patches, and the guard at the end."""

import asyncio
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from isthmus.cloud.offers.offer import offer_of
from isthmus.cloud.personalise import job_rows, signing, students
from isthmus.cloud.personalise.job import Distilled, Exported, HeadsTrained, Selected, Taken
from isthmus.cloud.server import Server
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.data.cache.read import INDEX
from isthmus.distill.release import Release
from isthmus.distill.student.base import make_base, make_student
from isthmus.edge.agent.device_state import DeviceState
from isthmus.edge.agent.progress import Observer
from isthmus.edge.agent.run_config import RunConfig
from isthmus.edge.agent.runtime import Runtime
from isthmus.edge.behaviour.state import Phase
from isthmus.edge.capture.clip_plan import ClipPlan
from isthmus.edge.link.over_grpc import GrpcLink, open_channel
from isthmus.edge.own_clips.guard import Estimator
from isthmus.edge.own_clips.personal import Personal
from isthmus.proto.errors import Unavailable
from isthmus.proto.messages import Chunk, JobStatus

pytestmark = pytest.mark.e2e

ROUNDS = 3
SMALL_CHUNK_BYTES = 64 << 10
"""Chunks of which a patch of these small students has several."""


class BreakingLink(GrpcLink):
    """A link that breaks the stream of every patch of several chunks once, after the first chunk."""

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)
        self.broken: set[tuple[str, str]] = set()

    def fetch_file(self, student_id: str, file_name: str, offset_bytes: int) -> Iterator[Chunk]:
        stream = super().fetch_file(student_id, file_name, offset_bytes)
        for chunk in stream:
            yield chunk
            more = len(chunk.data) == SMALL_CHUNK_BYTES and file_name.endswith(".patch")
            if more and (student_id, file_name) not in self.broken:
                self.broken.add((student_id, file_name))
                raise Unavailable("the link is gone")


@pytest.fixture(scope="module")
def exported_release(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny release with a base student that runs, and a recipe whose second selection is good enough."""
    root = tmp_path_factory.mktemp("exported") / "release"
    shutil.copytree(tiny_release, root)
    for made in ("base", "students"):
        shutil.rmtree(root / made)
    index = Release.open(root).public.folder / INDEX
    listed = json.loads(index.read_text())
    for number, clip in enumerate(listed["clips"]):
        clip["actor"] = str(number // 3)  # eight people, each with every class
    index.write_text(json.dumps(listed))
    recipe = Release.open(root).recipe
    personalise = dataclasses.replace(recipe.personalise, rounds=ROUNDS, settled_at=0.01)
    (root / "recipe.json").write_text(dataclasses.replace(recipe, personalise=personalise).to_json())
    make_student(Release.open(root), 0, torch.device("cpu"))  # untrained weights are equal, and exported differently
    make_base(Release.open(root), torch.device("cpu"))
    return root


def live(rig: Any, plan: ClipPlan, folder: Path, observer: Observer, *, rounds: int = 0, **settings: object) -> Runtime:
    """A device's whole life up to serving, against a server on a free port; its runtime stays readable."""

    def life(port: int) -> Runtime:
        link = BreakingLink(open_channel(f"127.0.0.1:{port}"))
        config = RunConfig("kiosk", seed=1, rounds=rounds)
        runtime = Runtime(config, DeviceState(folder), link, plan.selection, observer=observer, jitter=lambda: 0.0)
        runtime.run()
        runtime.close()
        return runtime

    async def scenario() -> Runtime:
        server = Server(rig.settings(watch_interval_s=0.05, **settings))
        port = await server.start()
        try:
            return await asyncio.to_thread(life, port)
        finally:
            await server.stop()

    return asyncio.run(scenario())


def test_a_settled_job_and_its_student_in_patches_over_a_link_that_breaks(
    rig: Any, exported_release: Path, plan: ClipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.cloud.personalise.students.CHUNK_BYTES", SMALL_CHUNK_BYTES)
    statuses: list[JobStatus] = []
    rig = dataclasses.replace(rig, release=exported_release)
    runtime = live(rig, plan, tmp_path / "device", Observer(on_job=statuses.append), workers=1, worker_threads=1)
    state, final = runtime.state, statuses[-1]
    assert (state.phase, state.failure) == (Phase.SERVE, "")
    assert (final.settled, final.round, final.rounds) == (True, 1, ROUNDS), "the third round was not asked for"
    assert len(runtime.record.interim_ids) == 1

    manifest = runtime.slot.installed(final.student_id).manifest
    base = {file.sha256 for file in runtime.slot.installed(state.base_id).manifest.files}
    new = [file for file in manifest.files if file.sha256 not in base]
    patched = {file.name for file in new if file.patch is not None}
    assert {"audio_encoder.onnx", "visual_encoder.onnx"} <= patched
    assert runtime.slot.is_sound(final.student_id), "what the patches gave is what was signed"
    tally = runtime.record.downloads["student_final"]
    assert tally.came_bytes == sum(file.patch.size_bytes if file.patch else file.size_bytes for file in new), (
        "no byte came twice, though every long patch broke off"
    )
    assert tally.whole_bytes == sum(file.size_bytes for file in new)
    assert tally.came_bytes < tally.whole_bytes / 3
    assert isinstance(runtime.link, BreakingLink)
    broken = {name for student_id, name in runtime.link.broken if student_id == final.student_id}
    assert {"audio_encoder.onnx.patch", "visual_encoder.onnx.patch"} <= broken

    assert manifest.measured is not None
    known = runtime.slot.installed(state.base_id).manifest.measured
    assert known is not None
    assert sum(known.class_shares) == pytest.approx(1) and len(known.class_shares) == len(manifest.classes)
    habits = runtime.clips.habits(state.base_id)
    assert habits is not None
    assert habits.trained == known.class_shares
    assert manifest.measured.class_shares == known.class_shares, "all heads learned from all public clips"
    assert runtime.clips.habits(final.student_id) is not None
    for student_id in (state.base_id, final.student_id):
        centred = runtime.slot.installed(student_id).manifest.centred
        assert centred is not None and centred.person.people == 8
    reading = runtime.clips.reading(state.active_id)
    assert isinstance(reading, Personal) and reading.offset.clips == len(plan.selection)
    verdict = DeviceState(tmp_path / "device").verdict()
    assert verdict is not None
    assert set(verdict.new) == {estimator.value for estimator in Estimator}
    assert state.active_id == (final.student_id if verdict.accept else state.base_id)


def sabotaged(content: bytes, classes: int) -> bytes:
    """The head with its logits turned round: it runs, and is a distribution, and answers the least likely class."""
    model = onnx.load_model_from_string(content)
    for tensor in model.graph.initializer:
        if tensor.dims[0] == classes:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("good", [False, True])
def test_the_guard_takes_no_sabotaged_student(
    rig: Any, exported_release: Path, plan: ClipPlan, tmp_path: Path, good: bool
) -> None:
    rig = dataclasses.replace(rig, release=exported_release)
    settings, release = rig.settings(), Release.open(exported_release)
    offer = offer_of(release)
    work = tmp_path / "work"
    shutil.copytree(release.base_dir, work)
    head = work / "local_head.onnx"
    if not good:
        head.write_bytes(sabotaged(head.read_bytes(), len(offer.classes)))

    def finish_the_job() -> None:
        """In the worker's place: the finished student is the base student, its head turned round or not."""
        database = Database(settings.database_url)
        (job,) = job_rows.listing(database)
        students.publish(
            students.Shelf(database, Artefacts(settings.artefacts_url)),
            signing.load_or_create(settings.signing_key_path),
            offer,
            student_id="finished",
            device_id=job.device_id,
            kind="final",
            files=sorted(work.glob("*.onnx")),
            heads=work / students.HEADS_FILE,
            now_s=time.time(),
        )
        for event in (Taken(), Selected((1,)), Distilled(), HeadsTrained(), Exported("finished")):
            job_rows.apply(database, job.job_id, event, time.time())
        database.close()

    runtime = live(rig, plan, tmp_path / "device", Observer(on_accepted=finish_the_job), rounds=1)
    assert runtime.state.failure == ""
    assert runtime.slot.is_sound("finished"), "it verifies either way"
    current = runtime.slot.current()
    assert current is not None
    if good:
        assert (current.manifest.student_id, runtime.state.refused_id) == ("finished", "")
    else:
        assert (current.manifest.student_id, runtime.state.refused_id) == (runtime.state.base_id, "finished")
        assert "not good enough" in runtime.state.verdict
    assert runtime.record.downloads["student_final"].whole_bytes == (0 if good else head.stat().st_size)
