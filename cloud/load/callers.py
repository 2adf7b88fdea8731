"""The callers: image queries, devices' control calls, devices' streams of features, and the same against an echo.

Each is one connection of its own, as each device has. ``call`` raises grpc.aio.AioRpcError, or Refused for an answer
that is an error.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import grpc
import numpy as np

from isthmus.proto.codec import pack_frame
from isthmus.proto.messages import FeatureFrame, Features, NumberType, compressed_width
from isthmus.proto.v1 import elastic_pb2 as elastic_pb
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc

ECHO_UNARY: Final = "/isthmus.load.Echo/Unary"
ECHO_STREAM: Final = "/isthmus.load.Echo/Stream"
MAKE_QUERY: Final = "/isthmus.v1.ElasticService/MakeQuery"
_DESCRIBE: Final = "/isthmus.v1.PersonalisationService/DescribeStudent"
_INFER: Final = "/isthmus.v1.InferenceService/Infer"
_SETUP_S: Final = 30.0

_LOCAL: Final = ("127.0.0.1", "localhost", "[::1]")

Metadata = tuple[tuple[str, str], ...]


def channel_to(address: str, certificate: bytes | None = None) -> grpc.aio.Channel:
    """Return a channel with a connection of its own. Without a certificate to trust it is not encrypted."""
    # Channels with equal options share a connection unless an option forbids it.
    options = [("grpc.use_local_subchannel_pool", 1)]
    if certificate is not None:
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(certificate), options)
    if address.rpartition(":")[0] in _LOCAL:
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.aio.insecure_channel(address, options)


class Refused(Exception):
    """An answer that came in time and is an error. The text is the error's name."""


class Caller(Protocol):
    """One connection that sends calls of one kind."""

    async def open(self) -> None:
        """Do what must precede the first call, such as enrolling a device."""
        ...

    async def call(self, timeout_s: float) -> bool | None:
        """Send one call and wait for its answer. Return whether it was right; None: nobody knows."""
        ...

    async def close(self) -> None: ...


@dataclass
class Unary:
    """Calls of one method with the same bytes each time. Answers are not parsed."""

    channel: grpc.aio.Channel
    method: str
    request: bytes
    metadata: Metadata = ()

    async def open(self) -> None:
        await self.channel.channel_ready()
        self._call: Any = self.channel.unary_unary(self.method)

    async def call(self, timeout_s: float) -> bool | None:
        await self._call(self.request, timeout=timeout_s, metadata=self.metadata)
        return None

    async def close(self) -> None:
        await self.channel.close()


@dataclass
class Pictures(Unary):
    """Queries of labelled pictures in turn, whose answers are compared with the labels.

    ``requests`` holds a request and the right class for each picture. ``turn`` is shared by all connections.
    """

    requests: Sequence[tuple[bytes, int]] = ()
    turn: Iterator[int] = field(default_factory=itertools.count)

    async def call(self, timeout_s: float) -> bool:
        request, label = self.requests[next(self.turn) % len(self.requests)]
        reply = await self._call(request, timeout=timeout_s, metadata=self.metadata)
        return int(elastic_pb.MakeQueryResponse.FromString(reply).class_index) == label


@dataclass
class Device(Unary):
    """A device that enrols and then asks for its student's description: a control call that reads the database."""

    method: str = _DESCRIBE
    request: bytes = b""
    enrolment_key: str = ""

    async def open(self) -> None:
        await super().open()
        self.metadata, _ = await enrolled(self.channel, self.enrolment_key)


@dataclass
class Stream:
    """One stream of feature frames. They are answered in order, and several may be under way.

    ``prepare`` returns the metadata of the stream and a frame. ``error_of`` reads an answer, and returns the name of
    its error or "".
    """

    channel: grpc.aio.Channel
    method: str
    prepare: Callable[[grpc.aio.Channel], Awaitable[tuple[Metadata, bytes]]]
    error_of: Callable[[bytes], str] = lambda reply: ""
    _replies: asyncio.Task[None] | None = None
    _due: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    _waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    _sent: int = 0

    async def open(self) -> None:
        await self.channel.channel_ready()
        metadata, self._frame = await self.prepare(self.channel)
        stream: Any = self.channel.stream_stream(self.method)
        self._replies = asyncio.create_task(self._read(stream(self._requests(), metadata=metadata)))

    async def call(self, timeout_s: float) -> None:
        if self._replies is None or self._replies.done():
            raise Refused("StreamEnded")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._due.put_nowait(pb.InferRequest(sequence=self._sent, frame=self._frame).SerializeToString())
        self._sent += 1
        await asyncio.wait_for(future, timeout_s)

    async def close(self) -> None:
        if self._replies is not None:
            self._due.put_nowait(None)
            await asyncio.wait([self._replies], timeout=1.0)
            self._replies.cancel()
        await self.channel.close()

    async def _requests(self) -> AsyncIterator[bytes]:
        while (message := await self._due.get()) is not None:
            yield message

    async def _read(self, replies: Any) -> None:
        error: Exception = Refused("StreamEnded")
        try:
            async for reply in replies:
                future = self._waiting.popleft()
                name = self.error_of(reply)
                if not future.done():
                    future.set_exception(Refused(name)) if name else future.set_result(None)
        except grpc.aio.AioRpcError as broken:
            error = broken
        finally:
            for future in self._waiting:
                if not future.done():
                    future.set_exception(error)


async def enrolled(channel: grpc.aio.Channel, enrolment_key: str) -> tuple[Metadata, pb.StudentManifest]:
    """Enrol a device. Returns the metadata of its calls and the manifest of its student."""
    stub = pb_grpc.PersonalisationServiceStub(channel)
    request = pb.EnrolRequest(device_name="load", enrolment_key=enrolment_key)
    token = (await stub.Enrol(request, timeout=_SETUP_S)).token
    metadata = (("authorization", f"Bearer {token}"),)
    described = await stub.DescribeStudent(pb.DescribeStudentRequest(), metadata=metadata, timeout=_SETUP_S)
    return metadata, pb.StudentManifest.FromString(described.manifest)


def device_stream(channel: grpc.aio.Channel, enrolment_key: str) -> Stream:
    """Return the stream of a new device with the base student; the frames hold random features at its first ratio."""

    async def prepare(channel: grpc.aio.Channel) -> tuple[Metadata, bytes]:
        metadata, manifest = await enrolled(channel, enrolment_key)
        student = (("isthmus-student", manifest.student_id),)
        return (*metadata, *student), random_frame(manifest.feature_width, manifest.ratios[0])

    return Stream(channel, _INFER, prepare, _error_of)


def echo_stream(channel: grpc.aio.Channel, frame: bytes) -> Stream:
    """Return a stream of the same frames to the echo server."""

    async def prepare(channel: grpc.aio.Channel) -> tuple[Metadata, bytes]:
        return (), frame

    return Stream(channel, ECHO_STREAM, prepare)


def random_frame(feature_width: int, ratio: float) -> bytes:
    """Return a packed frame of random features in float32."""
    rng = np.random.default_rng(0)
    width = compressed_width(feature_width, ratio)
    features = Features(rng.random(width, np.float32), rng.random(width, np.float32))
    return pack_frame(FeatureFrame(features, ratio, NumberType.FP32))


def query(channel: grpc.aio.Channel, task: str, encoded: bytes, latency_s: float, key: str | None) -> Unary:
    """Return a caller that asks for the class of one image (a JPEG or PNG file)."""
    return Unary(channel, MAKE_QUERY, _question(task, encoded, latency_s), with_key(key))


def labelled_queries(
    channel: grpc.aio.Channel,
    task: str,
    pictures: Sequence[tuple[bytes, int]],
    latency_s: float,
    key: str | None,
    turn: Iterator[int],
) -> Pictures:
    """Return a caller that asks for the classes of pictures in turn. Each is a file and the index of its class."""
    requests = [(_question(task, encoded, latency_s), label) for encoded, label in pictures]
    return Pictures(channel, MAKE_QUERY, requests[0][0], with_key(key), requests, turn)


def _question(task: str, encoded: bytes, latency_s: float) -> bytes:
    return elastic_pb.MakeQueryRequest(task=task, encoded=encoded, latency_s=latency_s).SerializeToString()


def with_key(key: str | None) -> Metadata:
    return () if key is None else (("authorization", f"Bearer {key}"),)


def _error_of(reply: bytes) -> str:
    answer = pb.InferResponse.FromString(reply)
    return grpc_name(answer.error.code) if answer.HasField("error") else ""


def grpc_name(code: int) -> str:
    """Return the name of a status code, such as DEADLINE_EXCEEDED."""
    return next((status.name for status in grpc.StatusCode if status.value[0] == code), str(code))
