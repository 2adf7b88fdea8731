"""The service runs every strategy that a recipe may name on a device's uploads, features included."""

import asyncio
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from isthmus.cloud.personalise import job_rows, service
from isthmus.cloud.personalise.distilling import DistillLearning
from isthmus.cloud.personalise.worker import Worker
from isthmus.cloud.store.database import Database
from isthmus.distill.release import Release
from isthmus.distill.selection import STRATEGIES
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.messages import Prototypes, UploadMode
from isthmus.proto.v1 import isthmus_pb2 as pb


def release_with(strategy: str, source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    recipe = Release.open(source).recipe
    personalise = dataclasses.replace(recipe.personalise, strategy=strategy)
    (folder / "recipe.json").write_text(dataclasses.replace(recipe, personalise=personalise).to_json())
    return folder


def with_features(rig: Any, width: int) -> pb.Prototypes:
    rng = np.random.default_rng(3)
    values_KC = rng.dirichlet(np.ones(len(rig.recipe.classes)), 4).astype(np.float32)
    features_KE = rng.standard_normal((4, width), np.float32)
    return prototypes_to_pb(Prototypes(values_KC, np.full(4, 3, np.int32), UploadMode.FEATURES, 3, None, features_KE))


def start(rig: Any, prototypes: pb.Prototypes) -> str | grpc.StatusCode:
    async def scenario() -> str | grpc.StatusCode:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            request = pb.StartPersonalisationRequest(idempotency_key="k", prototypes=prototypes, rounds=1)
            try:
                reply = await device.personalisation.StartPersonalisation(request, metadata=device.metadata)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return str(reply.job.job_id)

    return asyncio.run(scenario())


def test_a_job_with_features_and_soft_weights_from_upload_to_student(rig: Any, tmp_path: Path) -> None:
    release = release_with("density_ratio", rig.release, tmp_path / "release")
    rig = dataclasses.replace(rig, release=release)
    job_id = start(rig, with_features(rig, 2 * rig.recipe.feature_width))
    worker = Worker(rig.settings())
    assert worker.run_once()
    job = job_rows.get(Database(rig.settings().database_url), job_id)
    assert job is not None
    assert (job.stage.value, job.error) == ("ready", "")
    assert sum(job.selected_per_class) > 0


def test_what_a_device_sent_reaches_every_strategy(rig: Any, tmp_path: Path) -> None:
    job_id = start(rig, with_features(rig, 2 * rig.recipe.feature_width))
    sent = service.from_payload(job_rows.payload(Database(rig.settings().database_url), job_id, 0))
    assert sent.features_KE is not None
    for strategy in STRATEGIES:
        learning = DistillLearning(Release.open(release_with(strategy, rig.release, tmp_path / strategy)))
        for prototypes in (sent, dataclasses.replace(sent, mode=UploadMode.PROTOTYPES, features_KE=None)):
            selection = learning.select(prototypes, round=0, seed=1)
            assert sum(learning.per_class(selection)) == len(selection) > 0


def test_features_of_another_width_or_under_the_floor_start_no_job(rig: Any) -> None:
    assert start(rig, with_features(rig, 10)) is grpc.StatusCode.INVALID_ARGUMENT
    small = with_features(rig, 2 * rig.recipe.feature_width)
    small.min_cluster = 1
    small.sizes[0] = 2
    assert start(rig, small) is grpc.StatusCode.INVALID_ARGUMENT
