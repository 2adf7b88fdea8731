"""A server with executors in processes and on Ray: the model's answers, and no query is lost when one is killed."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from isthmus.cloud.cluster import connection as cluster
from isthmus.cloud.elastic.executors.on_ray import RayExecutor
from isthmus.cloud.elastic.executors.process import ProcessExecutor
from isthmus.cloud.elastic.scheduling.scaling import full_image_s
from isthmus.cloud.elastic.serve.live import LiveEngine
from isthmus.cloud.elastic.serve.registry import Registry
from isthmus.proto.errors import Corrupt, InvalidInput
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import THREE, ElasticRig, pixels, png, tiny_profile
from tests.rigs.project.processes import descendants

WAIT_S = 300.0
CHILD = "isthmus.cloud.elastic.executors.child"


@pytest.fixture
def rig(tmp_path: Path) -> ElasticRig:
    return ElasticRig(tmp_path)


def query(number: int, latency_s: float = WAIT_S) -> pb.MakeQueryRequest:
    made = THREE[number % 3]
    return pb.MakeQueryRequest(task=made.spec.name, encoded=png(pixels(number % 30)), latency_s=latency_s)


def executors(live: LiveEngine) -> list[int]:
    """Returns the executors' process ids."""
    return [each.pid for each in live._crew.all if isinstance(each, ProcessExecutor | RayExecutor) and each.pid]


@pytest.fixture(params=["process", "ray"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    yield str(request.param)
    if request.param == "ray":
        cluster.leave()


def test_a_killed_executor_costs_no_query_and_comes_back(rig: ElasticRig, kind: str) -> None:
    async def scenario() -> tuple[list[Any], int]:
        async with rig.running(*THREE, executor=kind, elastic_executors=2) as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            assert server.elastic is not None
            live = server.elastic.live
            answers: list[Any] = []
            asked: list[asyncio.Task[Any]] = []

            async def ask(number: int) -> None:
                answers.append((number, await stub.MakeQuery(query(number))))

            for number in range(30):
                asked.append(asyncio.create_task(ask(number)))
            before = executors(live)
            assert len(before) == 2
            os.kill(before[0], signal.SIGKILL)
            number, until_s = 30, time.monotonic() + WAIT_S
            while live.snapshot().restarts < 1 or live.snapshot().executors < 2:
                assert time.monotonic() < until_s
                asked.append(asyncio.create_task(ask(number)))
                number += 1
                await asyncio.sleep(0.05)
            await asyncio.gather(*asked)
            after = executors(live)
            assert before[0] not in after and before[1] in after and len(after) == 2
            return answers, number

    answers, count = asyncio.run(scenario())
    assert sorted(number for number, _ in answers) == list(range(count))
    for number, reply in answers:
        expected = rig.direct(THREE[number % 3], pixels(number % 30), reply.gamma)
        np.testing.assert_allclose(reply.logits, expected, atol=1e-4)
    assert not descendants(CHILD)


def test_with_the_only_process_killed_queries_end_in_time(rig: ElasticRig) -> None:
    async def scenario() -> None:
        async with rig.running(*THREE, executor="process") as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            assert server.elastic is not None
            os.kill(executors(server.elastic.live)[0], signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                while True:  # the kernel may take a moment
                    await stub.MakeQuery(query(0, latency_s=0.2))
            assert refused.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)
            assert (await stub.MakeQuery(query(1))).class_name

    asyncio.run(scenario())


def test_no_process_outlives_a_server_that_could_not_start(rig: ElasticRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(registry: Registry) -> None:
        raise Corrupt("a task's weights are damaged")

    async def scenario() -> None:
        async with rig.running(executor="process"):
            pass

    monkeypatch.setattr(Registry, "load", damaged)
    with pytest.raises(Corrupt, match="weights are damaged"):
        asyncio.run(scenario())
    assert not descendants(CHILD)


def test_warmed_models_are_for_a_thread(rig: ElasticRig) -> None:
    async def scenario() -> None:
        async with rig.running(executor="process", elastic_warm=rig.folder):
            pass

    with pytest.raises(InvalidInput, match="for one executor in a thread"):
        asyncio.run(scenario())


def test_a_cluster_elsewhere_needs_a_profile_of_its_own(rig: ElasticRig) -> None:
    async def scenario() -> None:
        async with rig.running(executor="ray://127.0.0.1:9", elastic_profile=None):
            pass

    with pytest.raises(InvalidInput, match="needs --elastic-profile, measured on a machine of the cluster"):
        asyncio.run(scenario())


def test_executors_are_started_for_a_load_and_no_query_is_lost(rig: ElasticRig, kind: str) -> None:
    """One executor at first. By its profile one image takes 0.1 s, so the load needs more than one executor."""
    (rig.folder / "profile.json").write_text(tiny_profile().slowed(0.1 / full_image_s(tiny_profile())).to_json())

    async def scenario() -> tuple[list[Any], int]:
        options = {"executor": kind, "elastic_executors": 1, "elastic_most_executors": 2}
        async with rig.running(*THREE, **options) as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            assert server.elastic is not None
            live = server.elastic.live
            until_s = time.monotonic() + WAIT_S
            assert live.snapshot().wanted == 1 and len(executors(live)) == 1
            answers: list[Any] = []

            async def ask_on() -> None:
                while live.snapshot().executors < 2:
                    assert time.monotonic() < until_s
                    answers.append(await stub.MakeQuery(query(len(answers))))

            await asyncio.gather(*(ask_on() for _ in range(32)))
            answers.append(await stub.MakeQuery(query(0)))
            assert live.snapshot().restarts == 0
            return answers, len(executors(live))

    answers, count = asyncio.run(scenario())
    assert count == 2 and all(answer.in_time for answer in answers)


def test_settings_of_growth_that_cannot_work_are_refused(rig: ElasticRig) -> None:
    async def refused(**options: Any) -> str:
        with pytest.raises(InvalidInput) as error:
            async with rig.running(*THREE, **options):
                pass
        return str(error.value)

    assert "add --executor process" in asyncio.run(refused(elastic_most_executors=2))
    below = asyncio.run(refused(executor="process", elastic_executors=3, elastic_most_executors=2))
    assert "--elastic-most-executors 2 is below --elastic-executors 3" in below
