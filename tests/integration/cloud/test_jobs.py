"""A device starts and follows personalisations. No worker runs here, so jobs stay in their stage."""

import asyncio
import time
from typing import Any

import grpc
import numpy as np

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.personalise.job import Distilled, Exported, Failed, Selected, Taken
from isthmus.cloud.store.database import Database
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.project.patience import reached

Stage = pb.JobStatus.Stage


def changed(prototypes: pb.Prototypes, **fields: Any) -> pb.Prototypes:
    copy = pb.Prototypes()
    copy.CopyFrom(prototypes)
    for name, value in fields.items():
        if name == "sizes":
            copy.ClearField("sizes")
            copy.sizes.extend(value)
        else:
            setattr(copy, name, value)
    return copy


def wrong_prototypes(rig: Any) -> dict[str, pb.Prototypes]:
    good = rig.prototypes()
    nan_KC = np.frombuffer(good.values, np.float32).copy()
    nan_KC[0] = np.nan
    return {
        "no distribution": changed(good, values=np.full((4, 3), 0.5, np.float32).tobytes()),
        "NaN": changed(good, values=nan_KC.tobytes()),
        "bytes missing": changed(good, values=good.values[:-4]),
        "another label set": rig.prototypes(classes=5),
        "under the server's floor": rig.prototypes(size=2),
        "under its own floor": changed(good, sizes=[3, 3, 1, 3]),
        "sizes missing": changed(good, sizes=[3]),
        "no mode": changed(good, mode=0),
        "nothing": pb.Prototypes(),
    }


def test_prototypes_that_are_not_sound_start_no_job(rig: Any) -> None:
    async def scenario() -> dict[str, grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            codes = {}
            for name, prototypes in wrong_prototypes(rig).items():
                request = pb.StartPersonalisationRequest(idempotency_key=name, prototypes=prototypes)
                call = device.personalisation.StartPersonalisation(request, metadata=device.metadata)
                codes[name] = (await rig.refusal(call))[0]
            assert (await rig.start(device)).stage == Stage.STAGE_QUEUED, "none of them left a job behind"
            return codes

    codes = asyncio.run(scenario())
    assert codes == dict.fromkeys(codes, grpc.StatusCode.INVALID_ARGUMENT)


def test_numbers_out_of_bounds_start_no_job(rig: Any) -> None:
    wrong = ({"rounds": -1}, {"rounds": 101}, {"seed": -1}, {"seed": 2**40}, {"key": ""}, {"key": "k" * 65})

    async def scenario() -> list[grpc.StatusCode]:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            return [(await rig.refusal(rig.start(device, **fields)))[0] for fields in wrong]

    assert asyncio.run(scenario()) == [grpc.StatusCode.INVALID_ARGUMENT] * len(wrong)


def test_the_same_key_is_the_same_job_and_another_must_wait(rig: Any) -> None:
    async def scenario() -> None:
        async with rig.running() as (_, channel):
            device, other = await rig.enrol(channel), await rig.enrol(channel)
            first, again = await asyncio.gather(rig.start(device, "a"), rig.start(device, "a"))
            assert first.job_id == again.job_id
            code, message = await rig.refusal(rig.start(device, "b"))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "under way" in message
            assert (await rig.start(other, "a")).job_id != first.job_id, "each device has its own keys"
            database = Database(rig.settings().database_url)
            job_rows.apply(database, first.job_id, Failed("enough"), time.time())
            database.close()
            assert (await rig.start(device, "a")).error == "enough"
            assert (await rig.start(device, "b")).job_id != first.job_id

    asyncio.run(scenario())


def test_however_many_watch_the_database_is_asked_once_a_turn(rig: Any, monkeypatch: Any) -> None:
    asked: list[int] = []
    usual = job_rows.named

    def counted(database: Database, job_ids: Any) -> Any:
        asked.append(len(tuple(job_ids)))
        return usual(database, job_ids)

    monkeypatch.setattr(job_rows, "named", counted)

    async def scenario() -> None:
        async with rig.running(watch_interval_s=0.05) as (_, channel):
            database = Database(rig.settings().database_url)
            watches = []
            for _ in range(12):
                device = await rig.enrol(channel)
                job = await rig.start(device)
                request = pb.WatchJobRequest(job_id=job.job_id)
                watches.append((job.job_id, device.personalisation.WatchJob(request, metadata=device.metadata)))
            for _, watch in watches:
                assert (await watch.read()).job.stage == Stage.STAGE_QUEUED
            for job_id, _ in watches:
                job_rows.apply(database, job_id, Taken(), time.time())
            for _, watch in watches:
                assert (await watch.read()).job.stage == Stage.STAGE_SELECTING
                watch.cancel()
            # The last cancellation has arrived once the looking has ended by itself: nobody watches, nobody looks.
            await reached(lambda: "job watch" not in {task.get_name() for task in asyncio.all_tasks()})
            database.close()

    asyncio.run(scenario())
    assert max(asked) == 12


def test_a_full_queue_says_so(rig: Any) -> None:
    async def scenario() -> grpc.StatusCode:
        async with rig.running(max_queued_jobs=1) as (_, channel):
            await rig.start(await rig.enrol(channel))
            return (await rig.refusal(rig.start(await rig.enrol(channel))))[0]

    assert asyncio.run(scenario()) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_watcher_hears_of_every_change_and_uploads_only_when_asked(rig: Any) -> None:
    async def scenario() -> None:
        async with rig.running(watch_interval_s=0.01) as (_, channel):
            device = await rig.enrol(channel)
            job = await rig.start(device, rounds=2)
            database = Database(rig.settings().database_url)

            async def upload(round: int) -> pb.UploadPrototypesResponse:
                request = pb.UploadPrototypesRequest(job_id=job.job_id, round=round, prototypes=rig.prototypes())
                return await device.personalisation.UploadPrototypes(request, metadata=device.metadata)

            watch = device.personalisation.WatchJob(pb.WatchJobRequest(job_id=job.job_id), metadata=device.metadata)
            assert (await watch.read()).job.stage == Stage.STAGE_QUEUED
            assert (await rig.refusal(upload(1)))[0] is grpc.StatusCode.FAILED_PRECONDITION
            stages = []
            for event in (Taken(), Selected((3, 0, 1)), Distilled(), Exported("interim")):
                job_rows.apply(database, job.job_id, event, time.time())
                stages.append((await watch.read()).job)
            assert [status.stage for status in stages] == [
                Stage.STAGE_SELECTING,
                Stage.STAGE_DISTILLING,
                Stage.STAGE_EXPORTING,
                Stage.STAGE_AWAITING_PROTOTYPES,
            ]
            awaiting = stages[-1]
            assert (awaiting.round, awaiting.student_id) == (1, "interim")
            assert list(awaiting.selected_per_class) == [3, 0, 1]
            for wrong in (0, 2):
                code, _ = await rig.refusal(upload(wrong))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert (await upload(1)).job.stage == Stage.STAGE_SELECTING
            assert (await upload(1)).job.stage == Stage.STAGE_SELECTING, "a repeated upload changes nothing"
            job_rows.apply(database, job.job_id, Failed("the end"), time.time())
            last = None
            while (reply := await watch.read()) is not grpc.aio.EOF:
                last = reply.job
            assert last is not None
            assert (last.stage, last.error) == (Stage.STAGE_FAILED, "the end")
            database.close()

    asyncio.run(scenario())
