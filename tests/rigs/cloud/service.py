"""A tiny release of random arrays and untrained networks, and a real server on it, made in seconds."""

import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.recipes import Recipe
from isthmus.distill.release import Release, save_weights
from isthmus.distill.teacher.teach import cache_teacher_outputs
from isthmus.proto.convert import prototypes_to_pb
from isthmus.proto.messages import Prototypes, UploadMode
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.rigs.data.random_cache import write_clips
from tests.rigs.distill.release import CLASSES, tiny_recipe

CLIPS = 24
BASE_FILE_BYTES = 1_300_000


def make_tiny_release(root: Path, recipe: Recipe | None = None) -> None:
    """Write an untrained release: real networks, random weights. Its base student's files are no ONNX, only bytes."""
    recipe = recipe or tiny_recipe()
    release = Release.create(root, recipe)
    write_clips(release.public_dir / "clips", recipe.input, CLASSES, CLIPS)
    (root / "public.json").write_text(json.dumps({"folder": "clips"}))
    torch.manual_seed(0)
    save_weights(release.new_teacher(), release.teacher_path)
    save_weights(release.new_student(), release.student_path(0))
    cache_teacher_outputs(release, torch.device("cpu"))
    release.base_dir.mkdir()
    rng = np.random.default_rng(11)
    for name in ("audio_encoder.onnx", "visual_encoder.onnx", "teacher_head.onnx"):
        (release.base_dir / name).write_bytes(rng.bytes(BASE_FILE_BYTES))
    HeadBank(recipe.feature_width, len(CLASSES), recipe.ratios).save(release.base_dir / "heads.safetensors")


@dataclasses.dataclass(frozen=True)
class Client:
    """An enrolled device: its stubs and the metadata of its calls."""

    device_id: str
    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...]

    @property
    def personalisation(self) -> pb_grpc.PersonalisationServiceStub:
        return pb_grpc.PersonalisationServiceStub(self.channel)

    @property
    def inference(self) -> pb_grpc.InferenceServiceStub:
        return pb_grpc.InferenceServiceStub(self.channel)

    async def describe(self, student_id: str = "") -> pb.StudentManifest:
        request = pb.DescribeStudentRequest(student_id=student_id)
        reply = await self.personalisation.DescribeStudent(request, metadata=self.metadata)
        return pb.StudentManifest.FromString(reply.manifest)


@dataclasses.dataclass(frozen=True)
class Rig:
    """Runs a real server on the tiny release, in the test's own folder."""

    release: Path
    state: Path
    recipe: Recipe = dataclasses.field(default_factory=tiny_recipe)

    def settings(self, **changes: object) -> CloudSettings:
        """Return the settings of a server without a worker, on a free port of loopback."""
        return CloudSettings(**{"release": self.release, "state": self.state, "workers": 0, **changes})

    @asynccontextmanager
    async def running(self, **changes: object) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
        """Start a server; yield it and a channel to it."""
        server = Server(self.settings(**changes))
        port = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield server, channel
        finally:
            await server.stop()

    async def enrol(self, channel: grpc.aio.Channel, name: str = "kiosk", key: str = "") -> Client:
        request = pb.EnrolRequest(device_name=name, enrolment_key=key)
        reply = await pb_grpc.PersonalisationServiceStub(channel).Enrol(request)
        return Client(reply.device_id, channel, (("authorization", f"Bearer {reply.token}"),))

    def prototypes(self, rows: int = 4, classes: int = len(CLASSES), size: int = 3) -> pb.Prototypes:
        values_KC = np.random.default_rng(3).dirichlet(np.ones(classes), rows).astype(np.float32)
        sizes_K = np.full(rows, size, np.int32)
        return prototypes_to_pb(Prototypes(values_KC, sizes_K, UploadMode.PROTOTYPES, size))

    async def start(self, client: Client, key: str = "k1", *, rounds: int = 1, seed: int = 5) -> pb.JobStatus:
        request = pb.StartPersonalisationRequest(
            idempotency_key=key, prototypes=self.prototypes(), rounds=rounds, seed=seed
        )
        return (await client.personalisation.StartPersonalisation(request, metadata=client.metadata)).job

    async def refusal(self, call: Any) -> tuple[grpc.StatusCode, str]:
        """Return status and message of a refused call or stream. Fails if the call is accepted."""
        try:
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details()
        pytest.fail("the call was accepted")
