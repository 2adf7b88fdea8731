"""A server whose batches run in processes: the model's answers, and every query ends when one of them is killed."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from isthmus.proto.errors import InvalidInput
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import THREE, ElasticRig, pixels, png

WAIT_S = 300.0


@pytest.fixture
def rig(tmp_path: Path) -> ElasticRig:
    return ElasticRig(tmp_path)


def query(number: int, latency_s: float = WAIT_S) -> pb.MakeQueryRequest:
    made = THREE[number % 3]
    return pb.MakeQueryRequest(task=made.spec.name, encoded=png(pixels(number % 30)), latency_s=latency_s)


def children() -> list[int]:
    of_mine = psutil.Process().children()
    return [each.pid for each in of_mine if "isthmus.cloud.elastic.executors.child" in " ".join(each.cmdline())]


def test_a_killed_process_costs_no_query_and_comes_back(rig: ElasticRig) -> None:
    async def scenario() -> tuple[list[Any], int]:
        async with rig.running(*THREE, executor="process", elastic_executors=2) as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            assert server.elastic is not None
            live = server.elastic.live
            answers: list[Any] = []
            asked: list[asyncio.Task[Any]] = []

            async def ask(number: int) -> None:
                answers.append((number, await stub.MakeQuery(query(number))))

            for number in range(30):
                asked.append(asyncio.create_task(ask(number)))
            before = children()
            assert len(before) == 2
            os.kill(before[0], signal.SIGKILL)
            number, until_s = 30, time.monotonic() + WAIT_S
            while live.snapshot().restarts < 1 or live.snapshot().executors < 2:
                assert time.monotonic() < until_s
                asked.append(asyncio.create_task(ask(number)))
                number += 1
                await asyncio.sleep(0.05)
            await asyncio.gather(*asked)
            after = children()
            assert before[0] not in after and before[1] in after and len(after) == 2
            return answers, number

    answers, count = asyncio.run(scenario())
    assert sorted(number for number, _ in answers) == list(range(count))
    for number, reply in answers:
        expected = rig.direct(THREE[number % 3], pixels(number % 30), reply.gamma)
        np.testing.assert_allclose(reply.logits, expected, atol=1e-4)
    assert children() == []


def test_with_the_only_process_killed_queries_end_in_time(rig: ElasticRig) -> None:
    async def scenario() -> None:
        async with rig.running(*THREE, executor="process") as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            os.kill(children()[0], signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                while True:  # the kernel may take a moment
                    await stub.MakeQuery(query(0, latency_s=0.2))
            assert refused.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)
            assert (await stub.MakeQuery(query(1))).class_name

    asyncio.run(scenario())
    assert children() == []


def test_warmed_models_are_for_a_thread(rig: ElasticRig) -> None:
    async def scenario() -> None:
        async with rig.running(executor="process", elastic_warm=rig.folder):
            pass

    with pytest.raises(InvalidInput, match="for one executor in a thread"):
        asyncio.run(scenario())
