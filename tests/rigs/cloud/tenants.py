"""A server that two tenants share, for devices and for images."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from isthmus.cloud.server import Server
from isthmus.cloud.store import tenants
from isthmus.cloud.store.database import Database
from isthmus.cloud.store.tenants import Key, Quotas, Tenant
from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType
from isthmus.proto.open_inference import inference_pb2_grpc as oip_grpc
from isthmus.proto.v1 import elastic_pb2_grpc
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.service import Client, Rig
from tests.rigs.elastic.server import ElasticRig


@dataclass(frozen=True)
class Shared:
    """A server that tenants "a" and "b" share, for devices and for images. Their keys are "<name>-enrol" and so on."""

    rig: Rig
    server: Server
    channel: grpc.aio.Channel
    database: Database

    async def enrol(self, tenant: str) -> Client:
        return await self.rig.enrol(self.channel, key=f"{tenant}-enrol")

    def key(self, tenant: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {tenant}-query"),)

    @property
    def elastic(self) -> Any:
        return elastic_pb2_grpc.ElasticServiceStub(self.channel)

    @property
    def inference(self) -> Any:
        return oip_grpc.GRPCInferenceServiceStub(self.channel)


@asynccontextmanager
async def shared(
    folder: Path, release: Path, quotas: dict[str, Quotas] | None = None, **changes: Any
) -> AsyncIterator[Shared]:
    """Start the server with both tenants. ``quotas``: those of tenants that have some."""
    elastic = ElasticRig(folder)
    database = Database(f"sqlite:///{folder / 'state' / 'isthmus.db'}")
    (folder / "state").mkdir()
    database.migrate()
    for name in ("a", "b"):
        tenants.put(database, Tenant(name, 1.0, (quotas or {}).get(name, Quotas())))
        for purpose in ("enrol", "query"):
            digest = hashlib.sha256(f"{name}-{purpose}".encode()).digest()
            tenants.add_key(database, Key(digest, name, purpose, 1.0))
    async with elastic.running(release=release, workers=0, **changes) as (server, channel):
        yield Shared(Rig(release, folder / "state"), server, channel, database)
    database.close()


def frame(manifest: pb.StudentManifest) -> bytes:
    ones = np.ones(manifest.feature_width, np.float32)
    return pack_frame(FeatureFrame(Features(ones, ones), manifest.ratios[0], NumberType.FP32))
