"""The runner with learning that takes no time: two rounds, failures, a full disk, a kill between any two steps."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isthmus.cloud.offers.offer import Offer
from isthmus.cloud.personalise import leases, students
from isthmus.cloud.personalise.job import Job
from isthmus.cloud.personalise.learning import OnEpoch, RoundWork
from isthmus.distill.selection import Selection
from isthmus.proto.convert_person import centred_to_bytes
from isthmus.proto.convert_student import manifest_from_bytes
from isthmus.proto.messages import Prototypes, Stage
from tests.rigs.cloud.jobs import EPOCHS, Bench, CountedLearning
from tests.rigs.distill.people import person_model


class Killed(BaseException):
    """Simulates ``kill -9``: no code of ours catches it."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_two_rounds_with_an_interim_student_between_them(bench: Bench) -> None:
    bench.start(rounds=2)
    awaiting = bench.run(CountedLearning())
    assert (awaiting.stage, awaiting.round, awaiting.student_id) == (Stage.AWAITING_PROTOTYPES, 1, "job-r0")
    interim = manifest_from_bytes(bench.described().manifest_bytes)
    assert (interim.student_id, interim.kind, interim.ratios) == ("job-r0", "interim", ())
    bench.upload(1)
    ready = bench.run(CountedLearning())
    assert (ready.stage, ready.student_id, ready.selected_per_class) == (Stage.READY, "job", (4, 0))
    final = manifest_from_bytes(bench.described().manifest_bytes)
    assert (final.student_id, final.kind, final.ratios) == ("job", "final", (1.0,))
    assert bench.student("job").count(b"\n") == EPOCHS - 1
    assert not list(bench.work_dir.iterdir())


class KnowsPeople(CountedLearning):
    """Learning that fits a person model too; ``content`` None does not."""

    def __init__(self, content: bytes | None) -> None:
        super().__init__()
        self._content = content

    def train_heads(self, work: RoundWork, heads: Path, on_epoch: OnEpoch) -> None:
        if self._content is not None:
            heads.with_name(students.PERSON_FILE).write_bytes(self._content)
        super().train_heads(work, heads, on_epoch)


def test_the_person_model_is_signed_with_the_student(bench: Bench) -> None:
    bench.start(rounds=2)
    content = centred_to_bytes(person_model(2, bench.offer.feature_width))
    bench.run(KnowsPeople(content))
    described = bench.described()
    assert manifest_from_bytes(described.manifest_bytes).centred is None, "an interim student has no heads"
    bench.upload(1)
    assert bench.run(KnowsPeople(content)).stage is Stage.READY
    centred = manifest_from_bytes(bench.described().manifest_bytes).centred
    assert centred is not None and centred_to_bytes(centred) == content


def test_a_damaged_person_model_is_not_published(bench: Bench) -> None:
    bench.start()
    failed = bench.run(KnowsPeople(b"\xff damaged"))
    assert failed.stage is Stage.FAILED and "remove it" in failed.error


def test_a_settled_selection_saves_rounds_and_not_epochs(bench: Bench) -> None:
    class Settling(CountedLearning):
        def select(self, prototypes: Prototypes, *, round: int, seed: int) -> Selection:
            return Selection.of(np.arange([4, 10, 11, 12][round], dtype=np.int64))

    bench.start(rounds=4)
    offer = replace(bench.offer, settled_at=0.9)
    assert bench.run(Settling(), offer).round == 1
    bench.upload(1)
    assert bench.run(Settling(), offer).round == 2, "4 of 10 clips are no settled selection"
    bench.upload(2)
    ready = bench.run(Settling(), offer)
    assert (ready.stage, ready.round, ready.rounds, ready.settled) == (Stage.READY, 2, 4, True)
    epochs = bench.student("job").decode().splitlines()
    assert [line.split(" on ")[0] for line in epochs] == [f"epoch {epoch}" for epoch in range(EPOCHS)]
    assert all(f"on {list(range(11))}" in line for line in epochs[2:]), "what is left is trained on the settled clips"


def test_a_kill_before_any_step_changes_nothing_in_the_end(tmp_path: Path) -> None:
    seen: list[str] = []

    def finish(folder: Path, before: Callable[[str], None]) -> tuple[bytes, Job]:
        folder.mkdir()
        bench = Bench(folder)
        bench.start(rounds=2)
        while True:
            try:
                job = bench.run(CountedLearning(before))
            except Killed:
                continue
            if job.stage.ended:
                return bench.student(job.student_id), job
            bench.upload(job.round)

    unharmed, job = finish(tmp_path / "unharmed", seen.append)
    assert job.stage is Stage.READY
    assert len(seen) == 2 + EPOCHS + 1 + 2
    for number, step in enumerate(seen):
        killed = [step]

        def kill_once(name: str, killed: list[str] = killed) -> None:
            if killed and name == killed[0]:
                killed.clear()
                raise Killed

        student, job = finish(tmp_path / str(number), kill_once)
        assert (job.stage, student) == (Stage.READY, unharmed), f"killed before {step}"


def test_what_fails_in_the_work_fails_the_job_shortly_and_is_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(step: str) -> None:
        if step == "epoch 2":
            raise RuntimeError("internal detail of /srv/state")

    bench.start()
    job = bench.run(CountedLearning(fail))
    assert job.stage is Stage.FAILED
    assert "distilling" in job.error
    assert "internal detail" not in job.error
    assert "internal detail" in caplog.text
    assert not list(bench.work_dir.iterdir())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_keeps_the_work_and_the_job_goes_on_later(bench: Bench, wrapped: bool) -> None:
    full = ["epoch 2"]

    def disk(step: str) -> None:
        if full and step == full[0]:
            full.clear()
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if wrapped:
                raise RuntimeError("the checkpoint was not written") from error
            raise error

    bench.start()
    learning = CountedLearning(disk)
    stalled = bench.run(learning)
    assert (stalled.stage, stalled.epoch) == (Stage.DISTILLING, 2)
    assert "disk is full" in stalled.error
    assert not leases.is_due(bench.database, bench.now_s())
    assert leases.is_due(bench.database, stalled.not_before_s)
    bench.clock_s = stalled.not_before_s
    ready = bench.run(learning)
    assert (ready.stage, ready.error) == (Stage.READY, "")


def test_a_job_of_an_older_release_fails_with_advice_to_start_again(bench: Bench) -> None:
    bench.start()
    newer = Offer("newer", ("a", "b"), "{}", 8, (1.0,), 2, EPOCHS, 3)
    job = bench.run(CountedLearning(), newer)
    assert (job.stage, job.error) == (Stage.FAILED, "the server has a new release; start again")


def test_only_the_newest_students_of_a_device_are_kept(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "audio_encoder.onnx"
    file.write_bytes(b"x")
    for number in range(5):
        students.publish(
            bench.shelf,
            bench.signer,
            bench.offer,
            student_id=f"s{number}",
            device_id="dev",
            kind="final",
            files=[file],
            heads=None,
            now_s=bench.now_s(),
        )
    students.prune(bench.shelf, "dev", keep=2)
    assert sorted(path.name for path in (tmp_path / "artefacts").iterdir()) == ["s3", "s4"]
