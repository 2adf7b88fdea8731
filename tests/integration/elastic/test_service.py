"""ElasticService over a real socket: tasks registered, asked, replaced; and everything that is refused."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest

from isthmus.cloud.commands.load.options import Load
from isthmus.cloud.commands.load.running import load
from isthmus.cloud.rpc.elastic import ElasticServicer
from isthmus.data.images import LabelledImages, write_images
from isthmus.proto.errors import TooLate
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.server import SIDE, THREE, ElasticRig, Made, huge_png, pixels, png, refusal, tiny_profile
from tests.rigs.project.patience import HANGS_S, reached

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NAN = float("nan")


@pytest.fixture
def rig(tmp_path: Path) -> ElasticRig:
    return ElasticRig(tmp_path)


def query(made: Made, seed: int = 0, **changes: Any) -> pb.MakeQueryRequest:
    return pb.MakeQueryRequest(**{"task": made.spec.name, "encoded": png(pixels(seed)), **changes})


def test_a_query_is_answered_as_the_model_itself_answers(rig: ElasticRig) -> None:
    async def scenario() -> list[pb.MakeQueryResponse]:
        async with rig.running(*THREE) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            listed = await stub.ListTasks(pb.ListTasksRequest())
            assert [task.description.name for task in listed.tasks] == ["five", "pair", "ten"]
            assert [list(task.prompted_gammas) for task in listed.tasks] == [[], [2], [2]]
            bare = pb.Pixels(rgb=pixels(3).tobytes(), height=SIDE, width=SIDE)
            asked = [query(made, seed) for seed, made in enumerate(THREE)]
            asked.append(pb.MakeQueryRequest(task="ten", pixels=bare, latency_s=30, utility=0.5))
            return await asyncio.gather(*(stub.MakeQuery(request) for request in asked))

    replies = asyncio.run(scenario())
    for seed, (made, reply) in enumerate(zip((*THREE, THREE[0]), replies, strict=True)):
        np.testing.assert_allclose(reply.logits, rig.direct(made, pixels(seed), reply.gamma), atol=1e-4)
        assert reply.class_name == made.spec.classes[int(np.argmax(reply.logits))]
        assert reply.in_time
        assert reply.run_s > 0 <= reply.queue_s


def test_the_load_generator_counts_right_answers_of_pictures_in_turn(rig: ElasticRig, tmp_path: Path) -> None:
    pictures = np.stack([pixels(seed) for seed in range(6)])
    answers = [int(rig.direct(THREE[0], picture, 0).argmax()) for picture in pictures]
    wrong = [(answers[0] + 1) % 10, *answers[1:]]
    write_images(tmp_path / "pictures.parquet", LabelledImages(pictures, np.array(wrong)))
    # All gammas but 0 are left out of the plans, so the answers are those of above.
    with rig.serving(THREE[0], elastic_policy="fixed:0") as address:
        load(
            Load(address, task="ten", data=tmp_path / "pictures.parquet", rate="30", duration_s=0.6, connections=2),
            tmp_path / "out.json",
        )
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["errors"] == {} and row["sent"] >= 6
    assert row["right_share"] == pytest.approx(1 - -(-row["sent"] // 6) / row["sent"], abs=1e-4)
    assert row["right_in_time_share"] <= row["right_share"]


def test_two_executors_give_the_same_answers_as_the_model(rig: ElasticRig) -> None:
    async def scenario() -> list[Any]:
        async with rig.running(*THREE, elastic_executors=2) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            return await asyncio.gather(*(stub.MakeQuery(query(THREE[n % 3], n)) for n in range(30)))

    for number, reply in enumerate(asyncio.run(scenario())):
        expected = rig.direct(THREE[number % 3], pixels(number), reply.gamma)
        np.testing.assert_allclose(reply.logits, expected, atol=1e-4)


def test_a_profile_that_is_wrong_is_followed_by_what_batches_take(rig: ElasticRig) -> None:
    (rig.folder / "profile.json").write_text(tiny_profile(4.0).to_json())  # it takes milliseconds

    async def scenario() -> None:
        async with rig.running(THREE[0]) as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            short = query(THREE[0], latency_s=3.0)
            assert (await refusal(stub.MakeQuery(short)))[0] is grpc.StatusCode.DEADLINE_EXCEEDED, "as it plans"
            assert server.elastic is not None
            for _ in range(60):
                if server.elastic.live.snapshot().pace < 0.5:
                    break
                await asyncio.gather(*(stub.MakeQuery(query(THREE[0], latency_s=50.0)) for _ in range(24)))
            assert server.elastic.live.snapshot().pace < 0.5
            assert (await stub.MakeQuery(short)).in_time

    asyncio.run(scenario())


def test_tasks_are_there_again_after_a_restart(rig: ElasticRig) -> None:
    async def scenario() -> tuple[Any, Any]:
        replies = []
        for tasks in (THREE, ()):
            async with rig.running(*tasks) as (_, channel):
                replies.append(await pb_grpc.ElasticServiceStub(channel).MakeQuery(query(THREE[1])))
        return replies[0], replies[1]

    before, after = asyncio.run(scenario())
    np.testing.assert_allclose(before.logits, after.logits, atol=1e-4)


def test_a_task_is_replaced_and_removed_in_mid_traffic(rig: ElasticRig) -> None:
    """Every query is answered by the one version or by the other, none is lost."""
    old = Made.random("task", 3, seed=7, gammas=())
    new = Made.random("task", 4, seed=8, gammas=())

    async def scenario() -> list[Any]:
        async with rig.running(old, THREE[0]) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            answers: list[Any] = []

            async def ask(seed: int) -> None:
                answers.append(await stub.MakeQuery(query(old, seed % 5)))

            first = [asyncio.create_task(ask(seed)) for seed in range(60)]
            replaced = await stub.RegisterTask(new.messages())
            assert replaced.task.version == 2
            await asyncio.gather(*first, *(ask(seed) for seed in range(20)))
            assert all(len(answer.logits) == 4 for answer in answers[-20:])
            last = [stub.MakeQuery(query(THREE[0])) for _ in range(20)]
            await stub.RemoveTask(pb.RemoveTaskRequest(name="task"))
            assert (await refusal(stub.MakeQuery(query(new))))[0] is grpc.StatusCode.NOT_FOUND
            await asyncio.gather(*last)
            return answers

    answers = asyncio.run(scenario())
    assert len(answers) == 80
    for answer in answers:
        made = old if len(answer.logits) == 3 else new
        close = [
            np.allclose(answer.logits, rig.direct(made, pixels(seed), answer.gamma), atol=1e-4) for seed in range(5)
        ]
        assert any(close)


def test_what_cannot_be_answered_is_refused_and_the_server_serves_on(rig: ElasticRig) -> None:
    ten = THREE[0]
    good = png(pixels(0))
    bare = pb.Pixels(rgb=bytes(SIDE * SIDE * 3), height=SIDE, width=SIDE)
    refused: list[tuple[pb.MakeQueryRequest, grpc.StatusCode, str]] = [
        (pb.MakeQueryRequest(task="nobody", encoded=good), grpc.StatusCode.NOT_FOUND, "no task 'nobody'"),
        (pb.MakeQueryRequest(task="ten"), INVALID, "none was sent"),
        (query(ten, encoded=b""), INVALID, "image"),
        (query(ten, encoded=b"GIF89a" + bytes(50)), INVALID, "neither a JPEG nor a PNG"),
        (query(ten, encoded=good[: len(good) // 2]), INVALID, "broken or truncated"),
        (query(ten, encoded=huge_png()), INVALID, "not decoded"),
        (query(ten, latency_s=-1), INVALID, "latency must be above 0"),
        (query(ten, latency_s=1e12), INVALID, "latency must be"),
        (query(ten, latency_s=NAN), INVALID, "latency must be"),
        (query(ten, utility=NAN), INVALID, "utility must be"),
        (query(ten, utility=-0.1), INVALID, "utility must be"),
        (query(ten, utility=float("inf")), INVALID, "utility must be"),
    ]
    for field, value in (("height", SIDE - 1), ("height", -SIDE), ("width", 0), ("rgb", b"short")):
        wrong = pb.Pixels()
        wrong.CopyFrom(bare)
        setattr(wrong, field, value)
        refused.append((pb.MakeQueryRequest(task="ten", pixels=wrong), INVALID, "are not"))
    other_size = pb.Pixels(rgb=bytes(32 * 32 * 3), height=32, width=32)
    refused.append((pb.MakeQueryRequest(task="ten", pixels=other_size), INVALID, "16 x 16 x 3 bytes"))

    async def scenario() -> pb.MakeQueryResponse:
        async with rig.running(ten) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            for request, status, message in refused:
                found = await refusal(stub.MakeQuery(request))
                assert found[0] is status, (found, message)
                assert message in found[1], found
            return await stub.MakeQuery(query(ten))

    assert len(asyncio.run(scenario()).logits) == 10


def test_a_registration_that_is_not_whole_or_does_not_fit_registers_nothing(rig: ElasticRig) -> None:
    made = Made.random("task", 3, seed=1)
    wide = dataclasses.replace(made.weights, head_weight_CD=np.zeros((3, 2 * 64), np.float32))
    long = dataclasses.replace(made.weights, prompts_LGD={2: np.zeros((5, 2, 64), np.float32)})

    def changed(change: str) -> Any:
        for message in made.messages():
            if message.WhichOneof("part") == "chunk":
                if change == "flip":
                    message.chunk.data = b"\0" + message.chunk.data[1:]
                elif change == "offset":
                    message.chunk.offset_bytes += 1
                elif change == "missing":
                    continue
            elif change == "hash":
                message.opening.weights_sha256 = bytes(32)
            elif change == "huge":
                message.opening.weights_bytes = 1 << 40
            elif change == "name":
                message.opening.task.name = "../x"
            yield message

    cases = [
        (changed("flip"), grpc.StatusCode.DATA_LOSS, "checksum"),
        (changed("hash"), grpc.StatusCode.DATA_LOSS, "not what was announced"),
        (changed("missing"), grpc.StatusCode.DATA_LOSS, "not what was announced"),
        (changed("offset"), INVALID, "starts at 0"),
        (changed("huge"), grpc.StatusCode.RESOURCE_EXHAUSTED, "at most"),
        (list(made.messages())[1:], INVALID, "describes the task"),
        ([], INVALID, "describes the task"),
        (made.messages(wide.to_bytes()), INVALID, "head.weight is 3 x 128"),
        (
            made.messages(long.to_bytes()),
            INVALID,
            "prompts.2 is 5 x 2 x 64",
        ),
        (made.messages(b"no weights"), INVALID, "not a safetensors file"),
        (changed("name"), INVALID, "task"),
    ]

    async def scenario() -> None:
        async with rig.running() as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            for messages, status, text in cases:
                found = await refusal(stub.RegisterTask(iter(messages)))
                assert found[0] is status, (found, text)
                assert text in found[1], found
            assert not (await stub.ListTasks(pb.ListTasksRequest())).tasks
            assert (await stub.RegisterTask(made.messages())).task.version == 1
        assert list((rig.folder / "state" / "scratch").iterdir()) == []

    asyncio.run(scenario())


def test_a_client_that_leaves_in_mid_query_leaves_nothing_behind(rig: ElasticRig) -> None:
    async def scenario() -> None:
        async with rig.running(THREE[0]) as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            leaving = [stub.MakeQuery(query(THREE[0])) for _ in range(50)]
            await leaving[0]
            for call in leaving[1:]:
                call.cancel()
            await asyncio.gather(*leaving[1:], return_exceptions=True)
            assert len((await stub.MakeQuery(query(THREE[0]))).logits) == 10
            elastic = server.elastic
            assert elastic is not None
            await reached(lambda: not elastic.decoder.pending and not elastic.live.waiting())

    asyncio.run(scenario())


def test_a_call_whose_deadline_is_over_is_told_so(rig: ElasticRig) -> None:
    async def scenario() -> tuple[grpc.StatusCode, str]:
        async with rig.running(THREE[0]) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            # Less than the model's fastest batch, by its profile.
            found = await refusal(stub.MakeQuery(query(THREE[0], latency_s=1e-4)))
            assert len((await stub.MakeQuery(query(THREE[0]), timeout=120)).logits) == 10
            return found

    code, message = asyncio.run(scenario())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "not computed" in message


def test_with_a_key_only_those_who_show_it_are_served(rig: ElasticRig, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")

    async def scenario() -> None:
        async with rig.running(elastic_key_file=key) as (_, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            for metadata in (None, (("authorization", "Bearer wrong"),), (("authorization", "sesame"),)):
                found = await refusal(stub.ListTasks(pb.ListTasksRequest(), metadata=metadata))
                assert found[0] is grpc.StatusCode.UNAUTHENTICATED
                assert "operator" in found[1]
            granted = (("authorization", "Bearer sesame"),)
            assert not (await stub.ListTasks(pb.ListTasksRequest(), metadata=granted)).tasks

    asyncio.run(scenario())


def test_metrics_count_queries_by_task_and_outcome(rig: ElasticRig) -> None:
    async def scenario() -> str:
        async with rig.running(THREE[0], metrics_port=0) as (server, channel):
            stub = pb_grpc.ElasticServiceStub(channel)
            for _ in range(3):
                await stub.MakeQuery(query(THREE[0]))
            await refusal(stub.MakeQuery(query(THREE[0], latency_s=1e-4)))
            url = f"http://127.0.0.1:{server.metrics_port}/metrics"
            return (await asyncio.to_thread(lambda: urlopen(url).read())).decode()

    text = asyncio.run(scenario())
    assert 'isthmus_elastic_arrivals_total{task="ten"} 4.0' in text
    assert 'isthmus_elastic_queries_total{outcome="in_time",task="ten"} 3.0' in text
    assert 'isthmus_elastic_queries_total{outcome="dropped",task="ten"} 1.0' in text
    assert 'isthmus_elastic_queue_seconds_count{task="ten"} 3.0' in text
    earned, offered = (
        float(text.partition(f'isthmus_elastic_utility_{what}_total{{task="ten"}} ')[2].partition("\n")[0])
        for what in ("earned", "offered")
    )
    assert 0 < earned <= 0.75 * offered * (1 + 1e-9), "three of four were in time"
    assert "isthmus_elastic_queue_length 0.0" in text
    method = 'grpc_method="MakeQuery",grpc_service="isthmus.v1.ElasticService",grpc_type="unary"'
    assert f"grpc_server_started_total{{{method}}} 4.0" in text
    assert f'grpc_server_handled_total{{grpc_code="OK",{method}}} 3.0' in text
    assert f'grpc_server_handled_total{{grpc_code="DEADLINE_EXCEEDED",{method}}} 1.0' in text


def test_a_registration_that_stalls_is_given_up(rig: ElasticRig) -> None:
    made = Made.random("task", 3)

    async def scenario() -> None:
        async with rig.running() as (server, _):
            assert server.elastic is not None
            scratch = rig.folder / "scratch"
            hasty = ElasticServicer(server.elastic, scratch, server.roster, upload_timeout_s=0.05)
            with pytest.raises(TooLate, match="did not arrive within"):
                await hasty.RegisterTask(stalling(), None)
            assert list(scratch.iterdir()) == []
            patient = ElasticServicer(server.elastic, scratch, server.roster, upload_timeout_s=HANGS_S)
            task = (await patient.RegisterTask(each(made.messages()), None)).task
            assert task.version == 1

    async def stalling() -> AsyncIterator[pb.RegisterTaskRequest]:
        yield next(made.messages())
        await asyncio.Event().wait()

    async def each(messages: Iterator[pb.RegisterTaskRequest]) -> AsyncIterator[pb.RegisterTaskRequest]:
        for message in messages:
            yield message

    asyncio.run(scenario())
