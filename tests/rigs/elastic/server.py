"""A tiny ViT with random weights, tasks for it, and a real server on loopback that serves them within seconds."""

import asyncio
import io
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.cloud.elastic.model.runner import ElasticRunner
from isthmus.cloud.elastic.model.timm_import import VisionTransformer
from isthmus.cloud.elastic.model.vit import ElasticViT
from isthmus.cloud.elastic.model.weights import load_vit
from isthmus.cloud.elastic.scheduling.profile import MachineKey, Profile
from isthmus.cloud.elastic.tasks.task import FloatArray, TaskSpec, TaskWeights
from isthmus.cloud.rpc.elastic_client import registration
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.data.images import STATISTICS, PixelSpec
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc
from tests.rigs.elastic.vit import save_vit

SIDE, WIDTH, DEPTH = 16, 64, 3
PIXELS = PixelSpec(SIDE, *STATISTICS["cifar10"])
GAMMAS = (-4, 0, 2)


def save_tiny_vit(path: Path) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=SIDE, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=1, num_classes=10)
    save_vit(vit, path)


def tiny_profile(seconds: float = 1e-3) -> Profile:
    latency_s = dict.fromkeys(GAMMAS, (seconds, 8 * seconds))
    return Profile(MachineKey("test", "cpu", 1, "float32", "tiny"), GAMMAS, (1, 64), {}, latency_s)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def png(pixels_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()


def huge_png(side: int = 20_000) -> bytes:
    """Returns a valid PNG of side x side black pixels: few bytes, many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    packed = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@dataclass(frozen=True)
class Made:
    """A task as its owner has it."""

    spec: TaskSpec
    weights: TaskWeights

    @staticmethod
    def random(name: str, classes: int, mode: Any = "append", seed: int = 0, gammas: tuple[int, ...] = (2,)) -> "Made":
        rng = np.random.default_rng(seed)
        prompts = {gamma: rng.standard_normal((DEPTH, gamma, WIDTH), np.float32) for gamma in gammas}
        head = TaskWeights(
            rng.standard_normal((classes, WIDTH), np.float32), rng.standard_normal(classes, np.float32), prompts
        )
        names = tuple(f"{name}-{index}" for index in range(classes))
        return Made(TaskSpec(name, names, mode, {-4: 0.7, 0: 0.8, 2: 0.9}, default_latency_s=60.0), head)

    def messages(self, data: bytes | None = None) -> Iterator[pb.RegisterTaskRequest]:
        return registration(self.spec, self.weights.to_bytes() if data is None else data)


THREE = (
    Made.random("ten", 10, "append", seed=1),
    Made.random("pair", 2, "replace", seed=2),
    Made.random("five", 5, gammas=(), seed=3),
)


@dataclass
class ElasticRig:
    """A tiny model with a profile in ``folder``, and servers that serve it."""

    folder: Path
    runner: ElasticRunner = field(init=False)
    http_port: int | None = field(init=False, default=None)
    """The port of HTTP while it serves, if it was started with ``http``."""

    def __post_init__(self) -> None:
        save_tiny_vit(self.folder / "vit.safetensors")
        (self.folder / "profile.json").write_text(tiny_profile().to_json())
        self.runner = ElasticRunner(ElasticViT(load_vit(self.folder / "vit.safetensors")), PIXELS)

    def settings(self, **changes: object) -> CloudSettings:
        return CloudSettings(
            **{
                "state": self.folder / "state",
                "elastic_model": str(self.folder / "vit.safetensors"),
                "elastic_pixels": "cifar10",
                "elastic_profile": self.folder / "profile.json",
                **changes,
            }
        )

    def direct(self, made: Made, pixels_HWC: np.ndarray, gamma: int) -> FloatArray:
        """Returns the logits of a direct call to the model."""
        (logits_C,) = self.runner.answer(
            pixels_HWC[None], gamma, [self.runner.prepare(made.weights, made.spec.prompt_mode)]
        )
        return logits_C

    @asynccontextmanager
    async def running(self, *tasks: Made, **changes: object) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
        server = Server(self.settings(**changes))
        port = await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                for made in tasks:
                    await pb_grpc.ElasticServiceStub(channel).RegisterTask(made.messages())
                yield server, channel
        finally:
            await server.stop()

    @contextmanager
    def serving(self, *tasks: Made, **changes: object) -> Iterator[str]:
        """Runs a server on an event loop in a thread of its own, for blocking clients. Yields its address."""
        address: list[str] = []
        up, stop = threading.Event(), asyncio.Event()
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            async with self.running(*tasks, port_file=self.folder / "port", **changes) as (server, _):
                self.http_port = server.http_port
                address.append((self.folder / "port").read_text().strip())
                up.set()
                await stop.wait()

        thread = threading.Thread(target=lambda: loop.run_until_complete(_always(serve(), up)))
        thread.start()
        try:
            assert up.wait(300)
            if not address:
                pytest.fail("the server did not start")
            yield address[0]
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()


async def _always(serving: Any, up: threading.Event) -> None:
    try:
        await serving
    finally:
        up.set()


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """Returns the status and message of a refused call. Fails if the call is accepted."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    pytest.fail("the call was accepted")
