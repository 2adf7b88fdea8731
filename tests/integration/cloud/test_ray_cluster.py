"""Learning steps on a Ray cluster whose nodes and head are killed, or one of another version: what a worker is told."""

import os
import threading
import time
from pathlib import Path

import pytest

from isthmus.cloud.cluster import connection
from isthmus.cloud.personalise import leases
from isthmus.cloud.personalise.elsewhere import on_ray
from isthmus.cloud.personalise.elsewhere.on_ray import RayLearning, StepActor
from isthmus.cloud.personalise.learning import RoundWork, StepDied
from isthmus.distill.selection import Selection
from isthmus.proto.errors import InvalidInput, IsthmusError, Unavailable
from isthmus.proto.messages import Stage
from tests.rigs.cloud.jobs import EPOCHS, Bench, CountedLearning
from tests.rigs.cloud.ray_nodes import RayNodes, running_ray

pytestmark = pytest.mark.timeout(1800)  # half a minute when idle: Ray starts and ends

WAIT_S = 600.0


HELD = "held"


class CountedActor(StepActor):
    """An actor whose learning needs no torch. While the release has a file HELD, it stops after its first epoch."""

    @staticmethod
    def _opened(release: str, release_hash: str, threads: int | None) -> CountedLearning:
        epochs: list[str] = []

        def before(step: str) -> None:
            if step.startswith("epoch"):
                epochs.append(step)
            while len(epochs) > 1 and (Path(release) / HELD).exists():
                time.sleep(0.05)

        return CountedLearning(before)


def connected(address: str) -> None:
    """Connect to a cluster, as soon as it answers."""
    until_s = time.monotonic() + WAIT_S
    while True:
        try:
            return connection.connect(address, 1)
        except InvalidInput as error:
            if "version" in str(error) or time.monotonic() > until_s:
                raise
            time.sleep(0.2)


@pytest.fixture
def learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayLearning:
    monkeypatch.setattr(on_ray, "StepActor", CountedActor)
    monkeypatch.setattr(on_ray, "POLL_S", 0.05)
    return RayLearning(CountedLearning(), tmp_path, "release", address="set by the test", threads=1)


def test_nodes_and_the_head_are_killed_in_mid_step_and_the_job_is_done_once(
    learning: RayLearning, tmp_path: Path
) -> None:
    """The first step loses its node, the second the whole cluster; neither counts as the job's fault."""
    bench = Bench(tmp_path)
    bench.start()
    lost: list[str] = []

    def run_and_kill(nodes: RayNodes, kill: str) -> Stage:
        learning._address = nodes.address
        connection.leave()
        connected(nodes.address)
        node = nodes.add()
        killed = threading.Event()
        held = tmp_path / HELD
        held.touch() if kill else held.unlink()

        def after_an_epoch(step: str) -> None:
            if kill and not killed.is_set():
                killed.set()
                nodes.kill(node) if kill == "node" else nodes.kill_head()

        original = learning.distil

        def distil(work: RoundWork, on_epoch: object) -> None:
            def told(epoch: int, epochs: int) -> None:
                on_epoch(epoch, epochs)  # type: ignore[operator]
                after_an_epoch("epoch")

            original(work, told)

        learning.distil = distil  # type: ignore[method-assign]
        try:
            taken = bench.take()
            assert taken is not None and taken.job.attempts == 0
            return bench.runner(learning).run(taken).stage  # type: ignore[arg-type]
        except IsthmusError as error:
            lost.append(type(error).__name__)
            assert isinstance(error, Unavailable)
            assert killed.is_set() or not kill, error
            leases.hand_back(bench.database, "worker")
            return Stage.DISTILLING
        finally:
            learning.distil = original  # type: ignore[method-assign]

    with running_ray() as nodes:
        assert run_and_kill(nodes, "node") is Stage.DISTILLING
        assert run_and_kill(nodes, "head") is Stage.DISTILLING
    connection.leave()
    with running_ray() as nodes:
        assert run_and_kill(nodes, "") is Stage.READY
    connection.leave()
    assert lost == ["Unavailable", "Unavailable"]
    text = bench.student("job").decode()
    assert [line.split(" on ")[0] for line in text.splitlines()] == [f"epoch {number}" for number in range(EPOCHS)]


def test_a_cluster_of_another_version_is_named(learning: RayLearning, tmp_path: Path) -> None:
    """The processes of the cluster say that they are of another version: Ray's own check has to find it."""
    (tmp_path / "sitecustomize.py").write_text('import ray\n\nray.__version__ = "2.40.0"\n')
    paths = (str(tmp_path), os.environ.get("PYTHONPATH", ""))
    with running_ray({"PYTHONPATH": os.pathsep.join(filter(None, paths))}) as nodes:
        connection.leave()
        with pytest.raises(InvalidInput, match=r"another version than Ray .* here: install one version on both"):
            connected(nodes.address)
        learning._address = nodes.address
        with pytest.raises(Unavailable, match="another version") as refused:
            learning.distil(RoundWork(Selection.whole(2), 0, 1, 1, tmp_path / "checkpoint"), lambda *epoch: None)
        assert not isinstance(refused.value, StepDied)
    connection.leave()
