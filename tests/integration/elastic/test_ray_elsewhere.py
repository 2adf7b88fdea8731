"""Executors on a Ray cluster that runs already, over Ray Client: answers, a killed actor, a cluster that is gone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.elastic.executors.on_ray import RayExecutor
from isthmus.cloud.elastic.executors.opening import Opening, opened
from isthmus.cloud.elastic.model.executor import ExecutorLost, Item
from isthmus.cloud.elastic.tasks.task import Task
from isthmus.proto.errors import InvalidInput
from tests.rigs.elastic.server import THREE, pixels, save_tiny_vit
from tests.rigs.project.ports import free_port

WAIT_S = 180.0


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address of Ray Client of a cluster of one CPU on loopback, and its process."""
    cluster.leave()
    port = free_port()
    environment = {
        **os.environ,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64),
    }
    os.environ["RAY_AUTH_MODE"] = "token"
    options = (
        f"--head --block --num-cpus 1 --port {free_port()} --ray-client-server-port {port} --include-dashboard false"
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split(), "--node-ip-address", "127.0.0.1"]
    with (tmp_path / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--object-store-memory", str(cluster.OBJECT_STORE_BYTES)],
            env=environment,
            stdout=log,
            stderr=log,
        )
    until_s = time.monotonic() + WAIT_S
    address = f"ray://127.0.0.1:{port}"
    while True:  # its port listens before it answers
        assert process.poll() is None and time.monotonic() < until_s, (tmp_path / "ray.log").read_text()
        try:
            cluster.connect(address, 1)
        except InvalidInput:
            time.sleep(0.1)
        else:
            break
    yield address, process
    cluster.leave()
    process.terminate()
    process.wait(WAIT_S)


def test_a_cluster_that_runs_already(head: "tuple[str, subprocess.Popen[bytes]]", tmp_path: Path) -> None:
    address, process = head
    save_tiny_vit(tmp_path / "vit.safetensors")
    opening = Opening(str(tmp_path / "vit.safetensors"), pixels="cifar10")
    runner = opened(opening)
    executor = RayExecutor(opening, runner.pixels, address=address, patience_s=20.0)
    executor.restore()
    items = [Item(pixels(seed), Task(made.spec, made.weights)) for seed, made in enumerate(THREE)]

    def check() -> None:
        for item, logits_C in zip(items, executor.run(items, 2), strict=True):
            (wanted_C,) = runner.answer(
                item.image[None], 2, [runner.prepare(item.task.weights, item.task.spec.prompt_mode)]
            )
            np.testing.assert_allclose(logits_C, wanted_C, atol=1e-4)

    check()
    assert executor.pid is not None
    os.kill(executor.pid, signal.SIGKILL)
    with pytest.raises(ExecutorLost):
        while True:
            executor.run(items, 2)
    executor.restore()
    check()
    process.terminate()
    process.wait(WAIT_S)
    with pytest.raises(ExecutorLost):
        while True:
            executor.run(items, 2)
    assert executor.lost
    executor.close()
