"""Executors of every kind: the model's own answers, failures that end with their batch, and coming back when killed."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.elastic.executors.child import START_NICER
from isthmus.cloud.elastic.executors.on_ray import RayExecutor
from isthmus.cloud.elastic.executors.opening import Opening, opened
from isthmus.cloud.elastic.executors.process import ProcessExecutor
from isthmus.cloud.elastic.model import runner as runners
from isthmus.cloud.elastic.model.attention import Mixing
from isthmus.cloud.elastic.model.executor import ExecutorLost, Item, ModelExecutor, Supervised
from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.tasks.task import FloatArray, Task
from tests.rigs.elastic.server import DEPTH, THREE, WIDTH, Made, pixels, save_tiny_vit
from tests.rigs.project.processes import descendants

GAMMAS = (-4, 0, 2)
WAIT_S = 600.0

Kind = ModelExecutor | ProcessExecutor | RayExecutor
Outside = ProcessExecutor | RayExecutor


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Opening:
    path = tmp_path_factory.mktemp("model") / "vit.safetensors"
    save_tiny_vit(path)
    return Opening(str(path), pixels="cifar10")


@pytest.fixture(scope="module")
def runner(opening: Opening) -> ElasticRunner:
    return opened(opening)


@pytest.fixture(scope="module")
def of_kind(request: pytest.FixtureRequest, opening: Opening, runner: ElasticRunner) -> Iterator[Callable[[str], Any]]:
    """Starts an executor of a kind when the first test wants it, and ends all of them."""
    made: dict[str, Any] = {}

    def started(kind: str) -> Any:
        if kind not in made:
            if kind == "thread":
                made[kind] = ModelExecutor(opened(opening), runner.pixels)
            else:
                if kind == "ray":
                    request.getfixturevalue("ray_cluster")
                outside = ProcessExecutor if kind == "process" else RayExecutor
                made[kind] = outside(opening, runner.pixels)
                made[kind].restore()
        return made[kind]

    yield started
    for executor in made.values():
        if isinstance(executor, Supervised):
            executor.close()


@pytest.fixture(params=["thread", "process", "ray"])
def executor(request: pytest.FixtureRequest, of_kind: Callable[[str], Any]) -> Kind:
    kind: Kind = of_kind(request.param)
    return kind


@pytest.fixture(params=["process", "ray"])
def outside(request: pytest.FixtureRequest, of_kind: Callable[[str], Any]) -> Outside:
    """An executor that can be lost."""
    kind: Outside = of_kind(request.param)
    return kind


def served(made: Made) -> Task:
    return Task(made.spec, made.weights)


def direct(runner: ElasticRunner, items: list[Item], gamma: int) -> list[FloatArray]:
    prepared = {item.task: runner.prepare(item.task.weights, item.task.spec.prompt_mode) for item in items}
    return [runner.answer(item.image[None], gamma, [prepared[item.task]])[0] for item in items]


def mixed(count: int = 9) -> list[Item]:
    tasks = [served(made) for made in THREE]
    return [Item(pixels(seed), tasks[seed % 3]) for seed in range(count)]


def same(found: list[FloatArray], wanted: list[FloatArray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_answers_of_mixed_tasks_are_the_models_own(executor: Kind, runner: ElasticRunner) -> None:
    items = mixed()
    executor.prepare(items[0].task)  # the other tasks are sent with their first batch
    for gamma in GAMMAS:
        same(executor.run(items, gamma), direct(runner, items, gamma))


def test_answers_stay_when_the_next_batch_runs(executor: Kind, runner: ElasticRunner) -> None:
    items = mixed(2)
    first = executor.run(items[:1], 0)
    executor.run(items[1:], 0)
    same(first, direct(runner, items[:1], 0))


def test_standardised_images_run_with_the_others(executor: Kind, runner: ElasticRunner) -> None:
    task = served(THREE[0])
    plain = [Item(pixels(seed), task) for seed in range(2)]
    ready = Item(runner.pixels.standardise(plain[1].image[None])[0], task)
    same(executor.run([plain[0], ready], 0), direct(runner, plain, 0))


def test_a_replaced_task_is_another_task(executor: Kind, runner: ElasticRunner) -> None:
    for seed in range(5):
        items = [Item(pixels(seed), served(Made.random("again", 3 + seed, seed=seed)))]
        same(executor.run(items, 2), direct(runner, items, 2))


def test_a_batch_that_fails_says_why_and_the_next_one_runs(executor: Kind, runner: ElasticRunner) -> None:
    wrong = Item(np.zeros((4, 4, 3), np.uint8), served(THREE[0]))
    with pytest.raises((RuntimeError, ValueError, AssertionError)) as failed:
        executor.run([wrong], 0)
    assert not isinstance(failed.value, ExecutorLost) and str(failed.value)
    unfit = served(Made.random("unfit", 3))
    unfit.weights.prompts_LGD[2].shape = (DEPTH, 1, 2 * WIDTH)  # type: ignore[misc]
    with pytest.raises((RuntimeError, ValueError)):
        executor.run([Item(pixels(0), unfit)], 2)
    items = mixed(3)
    same(executor.run(items, 0), direct(runner, items, 0))


def test_many_threads_take_turns(executor: Kind, runner: ElasticRunner) -> None:
    items = mixed(4)
    wanted, found = direct(runner, items, 0), [[], [], [], []]  # type: ignore[var-annotated]

    def ask(place: int) -> None:
        for _ in range(5):
            found[place] += executor.run([items[place]], 0)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    for place in range(4):
        same(found[place], [wanted[place]] * 5)


def kill(outside: Outside) -> None:
    assert outside.pid is not None
    os.kill(outside.pid, signal.SIGKILL)


def test_a_killed_one_is_noticed_while_idle_and_runs_again_with_its_tasks(
    outside: Outside, runner: ElasticRunner
) -> None:
    items = mixed(3)
    outside.run(items, 0)
    noticed = threading.Event()
    outside.watch(noticed.set)
    assert not outside.lost
    kill(outside)
    assert noticed.wait(WAIT_S) and outside.lost
    with pytest.raises(ExecutorLost):
        outside.run(items, 0)
    outside.prepare(served(THREE[0]))  # it is sent when there is a process
    outside.restore()
    assert not outside.lost
    same(outside.run(items, 0), direct(runner, items, 0))


def test_it_is_killed_in_the_middle_of_its_batches(outside: Outside, runner: ElasticRunner) -> None:
    items = mixed(60)
    began = threading.Event()
    lost: list[str] = []

    def batches() -> None:
        try:
            while True:
                outside.run(items, 0)
                began.set()
        except ExecutorLost as error:
            lost.append(str(error))

    thread = threading.Thread(target=batches)
    thread.start()
    assert began.wait(WAIT_S)
    kill(outside)
    thread.join(WAIT_S)
    assert len(lost) == 1
    outside.restore()
    same(outside.run(items[:3], 0), direct(runner, items[:3], 0))


def named_in_shared_memory(pid: int) -> set[str]:
    """What a process has mapped that has a name in /dev/shm, and so would stay there after a kill."""
    return {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if " /dev/shm/" in line}


def pipes_and_memory() -> set[tuple[str, int]]:
    """The pipes and the executors' shared memory that this process holds open, by name and inode."""
    found = set()
    for each in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # of another thread, which has closed it
            found.add((os.readlink(f"/proc/self/fd/{each}"), os.stat(f"/proc/self/fd/{each}").st_ino))
    return {each for each in found if each[0].startswith(("pipe:", "/memfd:isthmus"))}


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what processes hold")
def test_a_process_leaves_nothing_behind_however_it_ends(opening: Opening, runner: ElasticRunner) -> None:
    before, named = pipes_and_memory(), named_in_shared_memory(os.getpid())
    made = ProcessExecutor(opening, runner.pixels)
    made.restore()
    items = mixed(3)
    made.run(items, 0)
    pid = made.pid
    assert pid is not None
    held = pipes_and_memory() - before
    assert len(held) >= 3, "two pipes and the memory"
    assert named_in_shared_memory(pid) == set() and named_in_shared_memory(os.getpid()) <= named
    kill(made)
    made.close()
    gc.collect()
    assert not held & pipes_and_memory()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ExecutorLost, match="stopping"):
        made.restore()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities per thread")
def test_a_process_starts_nicer_than_it_runs(opening: Opening, runner: ElasticRunner) -> None:
    made = ProcessExecutor(opening, runner.pixels)
    made.start()
    pid, ours, nicest = made.pid, os.nice(0), 0
    assert pid is not None
    starting = threading.Thread(target=made.restore)
    starting.start()
    while starting.is_alive():
        for thread in psutil.Process(pid).threads():
            with suppress(ProcessLookupError):
                nicest = max(nicest, os.getpriority(os.PRIO_PROCESS, thread.id))
        starting.join(0.02)
    made.run(mixed(1), 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == ours, "its first thread runs the batches"
    assert nicest == min(19, ours + START_NICER)
    made.close()


def test_a_process_that_hangs_is_killed(opening: Opening, runner: ElasticRunner) -> None:
    made = ProcessExecutor(opening, runner.pixels, patience_s=0.5)
    made.restore()
    pid = made.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ExecutorLost, match=r"no answer for 0\.5 s and was killed"):
        made.run(mixed(1), 0)
    assert made.lost and not Path(f"/proc/{pid}").exists()
    made.close()


def test_what_cannot_be_opened_is_said(opening: Opening, runner: ElasticRunner, tmp_path: Path) -> None:
    for wrong, why in (
        (Opening(str(tmp_path / "none.safetensors"), "cifar10"), "there is no file"),
        (Opening(opening.source, "cifar10", model_hash="0" * 64), "restart the server"),
    ):
        made = ProcessExecutor(wrong, runner.pixels)
        with pytest.raises(ExecutorLost, match=why):
            made.restore()
        assert made.lost and made.pid is None
        made.close()


def test_an_opening_is_the_same_after_its_json_form() -> None:
    opening = Opening(
        "vit", "half", "cpu", "bfloat16", None, True, 2, {-4: (-4, 0, -8)}, "published", "ab", mixing="products"
    )
    assert Opening.from_json(opening.to_json()) == opening


def test_the_way_of_attention_that_was_measured_first_is_kept(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mixing] = ["products"]
    monkeypatch.setattr(runners, "fastest_mixing", lambda *arguments: asked.pop())
    half = replace(opening, number_type="bfloat16", packed=True)
    assert opened(half).model.mixing == "products"
    for mixing in ("fused", "products"):
        assert opened(replace(half, mixing=mixing)).model.mixing == mixing, "nothing is measured again"


def test_an_actor_that_is_made_while_the_server_stops_is_not_waited_for(
    opening: Opening, runner: ElasticRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RayExecutor(opening, runner.pixels)
    killed: list[object] = []

    class Waits:
        """An actor for which the cluster has no room yet."""

        @staticmethod
        def remote(*arguments: object) -> "Waits":
            return Waits()

    monkeypatch.setattr(cluster, "connect", lambda address, cpus: made.close())
    monkeypatch.setattr(cluster, "actor", lambda kind, cpus, gpus: Waits)
    monkeypatch.setattr(cluster, "first_answer", lambda call, within_s: pytest.fail("it was waited for"))
    monkeypatch.setattr(RayExecutor, "_kill", lambda self, actor: killed.append(actor))
    with pytest.raises(ExecutorLost, match="the server is stopping"):
        made.restore()
    assert made.lost and isinstance(killed[-1], Waits)


def test_a_cluster_of_ones_own_listens_on_loopback_alone_and_wants_a_token(of_kind: Callable[[str], Any]) -> None:
    of_kind("ray")
    listening = set()
    for pid in descendants("ray"):
        with suppress(psutil.NoSuchProcess):
            connections = psutil.Process(pid).net_connections(kind="inet")
            listening |= {each.laddr.ip.removeprefix("::ffff:") for each in connections if each.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_model_that_the_cluster_does_not_have_is_said(
    of_kind: Callable[[str], Any], runner: ElasticRunner, tmp_path: Path
) -> None:
    of_kind("ray")
    made = RayExecutor(Opening(str(tmp_path / "none.safetensors"), "cifar10"), runner.pixels)
    with pytest.raises(ExecutorLost, match="there is no file"):
        made.restore()
    assert made.lost
    made.close()
    with pytest.raises(ExecutorLost, match="stopping"):
        made.restore()


def test_an_actor_that_hangs_is_killed(of_kind: Callable[[str], Any], opening: Opening, runner: ElasticRunner) -> None:
    outside = of_kind("ray")
    outside.close()  # the cluster has room for one
    made = RayExecutor(opening, runner.pixels, patience_s=0.5)
    made.restore()
    assert made.pid is not None
    os.kill(made.pid, signal.SIGSTOP)
    with pytest.raises(ExecutorLost, match=r"no answer for 0\.5 s and was killed"):
        made.run(mixed(1), 0)
    assert made.lost
    made.close()
