"""Damage to each file of a cloud's state folder, and how the server takes it. See tests/rigs/edge/damage.py."""

import asyncio
import hashlib
import logging
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from isthmus.cloud.personalise.worker import Worker
from isthmus.cloud.server import Server
from isthmus.cloud.settings import CloudSettings
from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc
from tests.rigs.cloud.service import Rig
from tests.rigs.edge.damage import damages, files, put, told

FINE = frozenset({grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND})
"""Refusals of a call that a damaged file may lead to: damage, or a row that is no longer found."""


class _Tracebacks(logging.Handler):
    """Counts log records with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += record.exc_info is not None


class CloudFolder:
    """The state of a server that has personalised one device. Made by a real server and a real job."""

    def __init__(self, rig: Rig) -> None:
        self.root, self._rig = rig.state, rig
        self._token: tuple[tuple[str, str], ...] = ()
        self._public_key = b""
        self._known = b""

    async def prepare(self) -> None:
        async with self._rig.running() as (_, channel):
            request = pb.EnrolRequest(device_name="kiosk")
            enrolled = await pb_grpc.PersonalisationServiceStub(channel).Enrol(request)
            self._token = (("authorization", f"Bearer {enrolled.token}"),)
            self._public_key = enrolled.signing_public_key
            start = pb.StartPersonalisationRequest(
                idempotency_key="k", prototypes=self._rig.prototypes(), rounds=1, seed=1
            )
            await pb_grpc.PersonalisationServiceStub(channel).StartPersonalisation(start, metadata=self._token)
        worker = Worker(self._rig.settings())
        while worker.run_once():
            pass
        worker.database.close()
        async with self._rig.running() as (_, channel):
            self._known = await self._answer(channel)

    async def sweep(self, copies: Path, bits: int, only: tuple[str, ...] = ()) -> dict[str, Counter[str]]:
        """Damage each file in turn; return the outcomes per file. ``only``: beginnings of the names to take."""
        outcomes = {}
        for name in files(self.root):
            if only and not name.startswith(only):
                continue
            chance, seen = random.Random(name), Counter[str]()
            outcomes[name] = seen
            content = (self.root / name).read_bytes()
            if not name.startswith("artefacts/"):
                for kind, damaged in damages(content, bits, chance):
                    outcome = await self._restarted(copies / "copy", name, damaged)
                    seen[f"{kind}: {outcome}" if outcome.startswith("FAULT") else outcome] += 1
                continue
            seen[await self._restarted(copies / "copy", name, content[: len(content) // 2])] += 1
            shutil.copytree(self.root, copies / "running")
            async with self._rig.__class__(self._rig.release, copies / "running").running() as (_, channel):
                for kind, damaged in damages(content, bits, chance):
                    put(copies / "running" / name, damaged)
                    outcome = await self._asked(channel)
                    seen[f"{kind}: {outcome}" if outcome.startswith("FAULT") else outcome] += 1
                    if damaged is None:
                        (copies / "running" / name).rmdir()
                        (copies / "running" / name).touch()
                    put(copies / "running" / name, content)
            shutil.rmtree(copies / "running")
        return outcomes

    async def _restarted(self, copy: Path, name: str, damaged: bytes | None) -> str:
        """Start a server on a damaged copy and ask it."""
        shutil.copytree(self.root, copy)
        put(copy / name, damaged)
        server = Server(CloudSettings(release=self._rig.release, state=copy, workers=0))
        try:
            try:
                port = await server.start()
            except Exception as error:
                return told(error, name)
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    return await self._asked(channel)
            finally:
                await server.stop()
        finally:
            shutil.rmtree(copy)

    async def _asked(self, channel: grpc.aio.Channel) -> str:
        tracebacks = _Tracebacks()
        logging.getLogger("isthmus").addHandler(tracebacks)
        try:
            answer = await self._answer(channel)
        except grpc.aio.AioRpcError as error:
            if error.code() not in FINE or tracebacks.seen:
                return f"FAULT: {error.code().name}: {error.details()}, {tracebacks.seen} tracebacks"
            return f"call refused, {error.code().name}"
        except InvalidSignature:
            return "the device refuses the manifest"
        finally:
            logging.getLogger("isthmus").removeHandler(tracebacks)
        return "the same files and answer" if answer == self._known else "FAULT: other files or another answer"

    async def _answer(self, channel: grpc.aio.Channel) -> bytes:
        """Fetch the device's student and ask for one clip, as a device does; return both as bytes."""
        calls = pb_grpc.PersonalisationServiceStub(channel)
        reply = await calls.DescribeStudent(pb.DescribeStudentRequest(), metadata=self._token)
        Ed25519PublicKey.from_public_bytes(self._public_key).verify(reply.signature, reply.manifest)
        manifest = pb.StudentManifest.FromString(reply.manifest)
        parts = [reply.manifest]
        for file in manifest.files:
            fetch = pb.FetchStudentRequest(student_id=manifest.student_id, file_name=file.name)
            chunks = calls.FetchStudent(fetch, metadata=self._token)
            content = b"".join([chunk.data async for chunk in chunks])
            if hashlib.sha256(content).digest() != file.sha256:
                return b"a file that the device refuses"
            parts.append(content)
        ones = np.ones(manifest.feature_width, np.float32)
        frame = pack_frame(FeatureFrame(Features(ones, ones), manifest.ratios[0], NumberType.FP32))
        stub: Any = pb_grpc.InferenceServiceStub(channel)
        asked = stub.Infer(
            iter([pb.InferRequest(sequence=1, frame=frame)]),
            metadata=(*self._token, ("isthmus-student", manifest.student_id)),
        )
        answers = [each async for each in asked]
        parts.append(np.asarray(answers[0].probabilities, np.float32).tobytes())
        return b"".join(parts)


def swept(folder: CloudFolder, copies: Path, bits: int, only: tuple[str, ...] = ()) -> dict[str, Counter[str]]:
    """Prepare the folder and sweep it."""

    async def both() -> dict[str, Counter[str]]:
        await folder.prepare()
        return await folder.sweep(copies, bits, only)

    return asyncio.run(both())
