"""The learning steps of a job, in the worker and on Ray: the same selection, the same files, and no step half done."""

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from isthmus.cloud.offers.offer import offer_of
from isthmus.cloud.personalise.distilling import DistillLearning
from isthmus.cloud.personalise.elsewhere import on_ray
from isthmus.cloud.personalise.elsewhere.on_ray import RayLearning, StepActor
from isthmus.cloud.personalise.elsewhere.shards_on_ray import ShardsOnRay
from isthmus.cloud.personalise.elsewhere.step_folder import PREFIX
from isthmus.cloud.personalise.learning import Learning, RoundWork, StepDied
from isthmus.cloud.personalise.students import HEADS_FILE, MEASURED_FILE
from isthmus.distill.release import Release
from isthmus.distill.selection import Search, Selection
from isthmus.distill.selection.nearest import Nearest
from isthmus.proto.errors import InvalidInput, NotYours, Unavailable
from isthmus.proto.messages import Prototypes, UploadMode
from tests.rigs.cloud.jobs import CountedLearning
from tests.rigs.cloud.service import make_tiny_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("release")
    make_tiny_release(root)
    yield root


@pytest.fixture(scope="module")
def local(release: Path) -> DistillLearning:
    torch.set_num_threads(1)
    return DistillLearning(Release.open(release))


@pytest.fixture(scope="module")
def remote(release: Path, local: DistillLearning, ray_cluster: None) -> RayLearning:
    return RayLearning(local, release, offer_of(Release.open(release)).release_hash, address="ray", threads=1)


@pytest.fixture(params=["local", "ray"])
def learning(request: pytest.FixtureRequest) -> Learning:
    found: Learning = request.getfixturevalue("local" if request.param == "local" else "remote")
    return found


@pytest.fixture(scope="module")
def selection(local: DistillLearning) -> Selection:
    return local.select(prototypes(), round=0, seed=3)


def prototypes() -> Prototypes:
    values_KC = np.array([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]], np.float32)
    return Prototypes(values_KC, np.full(2, 3, np.int32), UploadMode.PROTOTYPES, 3)


def work(selection: Selection, folder: Path) -> RoundWork:
    folder.mkdir(parents=True, exist_ok=True)
    return RoundWork(selection, 0, 1, 3, folder / "checkpoint.safetensors")


def whole(learning: Learning, selection: Selection, folder: Path) -> dict[str, bytes]:
    """Performs all steps; returns the device's files and the job's."""
    of = work(selection, folder)
    seen: list[tuple[int, int]] = []
    learning.distil(of, lambda epoch, epochs: seen.append((epoch, epochs)))
    assert seen and seen == [(epoch + 1, seen[-1][1]) for epoch in range(seen[-1][1])], "every epoch is told once"
    heads = folder / HEADS_FILE
    learning.train_heads(of, heads, lambda epoch, epochs: None)
    interim = learning.export(of, None, folder / "interim")
    final = learning.export(of, heads, folder / "final")
    made = [*interim, *final, folder / MEASURED_FILE]
    return {f"{path.parent.name if path.parent != folder else ''}/{path.name}": path.read_bytes() for path in made}


def test_the_same_clips_are_selected(learning: Learning, selection: Selection) -> None:
    found = learning.select(prototypes(), round=0, seed=3)
    np.testing.assert_array_equal(found.indices_S, selection.indices_S)
    np.testing.assert_array_equal(found.weights_S, selection.weights_S)
    assert sum(learning.per_class(found)) <= len(found.indices_S)


def test_a_large_public_set_is_searched_in_shards_for_the_same_clips(
    local: DistillLearning, release: Path, selection: Selection, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    search = ShardsOnRay.search

    def counted(self: ShardsOnRay, asked: Callable[[int], Search]) -> Iterator[tuple[int, list[Nearest]]]:
        for number, found in search(self, asked):
            searched.append(number)
            yield number, found

    monkeypatch.setattr(ShardsOnRay, "search", counted)
    opened = Release.open(release)
    for samples, shards in ((len(opened.public), []), (len(opened.public) - 1, [0, 1]), (5, list(range(5)))):
        searched.clear()
        hashed = offer_of(opened).release_hash
        learning = RayLearning(local, release, hashed, address="ray", threads=1, shard_samples=samples)
        found = learning.select(prototypes(), round=0, seed=3)
        np.testing.assert_array_equal(found.indices_S, selection.indices_S)
        np.testing.assert_array_equal(found.weights_S, selection.weights_S)
        assert sorted(searched) == shards


def test_shards_that_a_cluster_cannot_read_are_tried_again(
    local: DistillLearning, release: Path, ray_cluster: None, tmp_path: Path
) -> None:
    copy = tmp_path / "release"
    shutil.copytree(release, copy)
    hashed = offer_of(Release.open(copy)).release_hash
    learning = RayLearning(local, copy, hashed, address="ray", threads=1, shard_samples=5)
    assert len(learning.select(prototypes(), round=0, seed=3))
    (probabilities,) = copy.glob("teacher_outputs/*/probabilities_NC.npy")
    probabilities.unlink()
    with pytest.raises(Unavailable, match="copy it to this machine again"):
        learning.select(prototypes(), round=0, seed=3)


def test_both_make_the_same_student(
    local: DistillLearning, remote: RayLearning, selection: Selection, tmp_path: Path
) -> None:
    here = whole(local, selection, tmp_path / "here")
    there = whole(remote, selection, tmp_path / "there")
    assert here.keys() == there.keys() and len(here) > 4
    for name in here:
        assert here[name] == there[name], name


def test_a_caller_that_raises_ends_the_step(learning: Learning, selection: Selection, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: int, epochs: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        learning.distil(work(selection, tmp_path), stop)
    learning.distil(work(selection, tmp_path), lambda epoch, epochs: None)


class SlowActor(StepActor):
    """An actor whose second epoch takes longer than anybody waits."""

    @staticmethod
    def _opened(release: str, release_hash: str, threads: int | None) -> CountedLearning:
        return CountedLearning(lambda step: time.sleep(600 if step == "epoch 1" else 0))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the open files of the step's process")
def test_a_step_that_is_ended_leaves_none_of_its_persons_files(
    remote: RayLearning,
    selection: Selection,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_ray, "StepActor", SlowActor)
    learning = RayLearning(CountedLearning(), tmp_path, "release", address="ray", threads=1)
    folders: list[Path] = []

    def forgotten(epoch: int, epochs: int) -> None:
        (said,) = [record for record in caplog.records if "a step runs on Ray" in record.message]
        assert isinstance(said.args, tuple)
        for each in Path(f"/proc/{said.args[0]}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed meanwhile
                folders.extend([Path(path)] if PREFIX in (path := os.readlink(each)) else [])
        assert [len(list(folder.iterdir())) for folder in folders] == [1], "the checkpoint of the first epoch"
        raise NotYours("no such job")

    remote._kept.let_go()
    with caplog.at_level(logging.INFO, "isthmus.cloud"), pytest.raises(NotYours):
        learning.distil(work(selection, tmp_path), forgotten)
    assert not folders[0].exists()


def test_a_step_that_fails_raises_its_own_error(learning: Learning, selection: Selection, tmp_path: Path) -> None:
    of = work(selection, tmp_path)
    of.checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(Exception) as failed:
        learning.distil(of, lambda epoch, epochs: None)
    assert not isinstance(failed.value, Unavailable)


def test_a_killed_step_is_lost_and_goes_on_from_its_checkpoint(
    remote: RayLearning, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "POLL_S", 0.01)
    of = work(selection, tmp_path)
    killed: list[Any] = []

    class Killing(RayLearning):
        def _run(self, begin: Any, note: Any = None) -> Any:
            def begin_and_die(actor: Any, call: str) -> Any:
                import ray

                if not killed:
                    killed.append(ray.get(actor.pid.remote()))
                    os.kill(killed[0], signal.SIGKILL)
                return begin(actor, call)

            return super()._run(begin_and_die, note)

    learning = Killing(remote._local, Path(remote._release), remote._release_hash, address="ray", threads=1)
    with pytest.raises(StepDied, match="Ray has lost a step"):
        learning.distil(of, lambda epoch, epochs: None)
    learning.distil(of, lambda epoch, epochs: None)
    assert of.checkpoint.exists()


def test_the_next_step_takes_the_same_process_while_it_is_there(
    remote: RayLearning, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process_of_a_step(learning: RayLearning) -> int:
        caplog.clear()
        with caplog.at_level(logging.INFO, "isthmus.cloud"):
            learning.select(prototypes(), round=0, seed=3)
        (said,) = [record for record in caplog.records if "a step runs on Ray" in record.message]
        assert isinstance(said.args, tuple)
        return int(str(said.args[0]))

    learning = RayLearning(remote._local, Path(remote._release), remote._release_hash, address="ray", threads=1)
    first = process_of_a_step(learning)
    assert process_of_a_step(learning) == first
    os.kill(first, signal.SIGKILL)
    monkeypatch.setattr(learning._kept, "_keep_s", 0.1)
    second = process_of_a_step(learning)
    assert second != first, "one that has died is no failure of the next step"
    while psutil.pid_exists(second):  # nobody took it in time
        time.sleep(0.05)
    learning._kept.let_go()


def test_another_release_on_the_cluster_is_said(remote: RayLearning, local: DistillLearning, release: Path) -> None:
    other = RayLearning(local, release, "0" * 64, address="ray", threads=1)
    with pytest.raises(Unavailable, match="another release on the cluster"):
        other.select(prototypes(), round=0, seed=3)


def test_a_cluster_that_is_not_there_is_said(local: DistillLearning, release: Path, tmp_path: Path) -> None:
    from isthmus.cloud.cluster import connection as cluster

    for name in ("ray://", "ray://host", "ray://:1", "gpu"):
        with pytest.raises(ValueError, match="none of thread, process, ray and ray://HOST:PORT"):
            cluster.check_name(name)
    error = cluster._said(RuntimeError("Version mismatch: The cluster was started with: Ray: 2.40.0"), "2.60.0")
    assert "another version than Ray 2.60.0 here: install one version on both" in error
    assert "start it with 'ray start --head'" in cluster._said(ConnectionError("ray client connection timeout"), "2.60")
    assert issubclass(InvalidInput, Exception)
