"""The client of ElasticService: registers tasks and sends queries, for the command line and for measurements."""

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from isthmus.cloud.elastic.tasks.task import TaskSpec
from isthmus.cloud.rpc.task_messages import spec_to_pb
from isthmus.proto.errors import NAME_KEY, TooLarge, from_status
from isthmus.proto.limits import CHUNK_BYTES, MAX_IMAGE_MESSAGE_BYTES
from isthmus.proto.v1 import elastic_pb2 as pb
from isthmus.proto.v1 import elastic_pb2_grpc as pb_grpc

_TIMEOUT_S = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def registration(spec: TaskSpec, weights: bytes) -> Iterator[pb.RegisterTaskRequest]:
    """Yield the messages of RegisterTask: the description, then the weights (a safetensors file) in chunks."""
    opening = pb.RegisterTaskRequest.Opening(
        task=spec_to_pb(spec), weights_bytes=len(weights), weights_sha256=hashlib.sha256(weights).digest()
    )
    yield pb.RegisterTaskRequest(opening=opening)
    for start in range(0, len(weights), CHUNK_BYTES):
        part = weights[start : start + CHUNK_BYTES]
        yield pb.RegisterTaskRequest(chunk=pb.WeightsChunk(offset_bytes=start, data=part, crc32=zlib.crc32(part)))


@dataclass(frozen=True)
class ElasticClient:
    """A connection to a server. Each call raises the IsthmusError that the server returned, or Unavailable.

    >>> with ElasticClient.connect("127.0.0.1:1") as client:  # nobody listens there
    ...     client.tasks()
    Traceback (most recent call last):
        ...
    isthmus.proto.errors.Unavailable: ...
    """

    stub: pb_grpc.ElasticServiceStub
    key: str | None

    @staticmethod
    @contextmanager
    def connect(server: str, *, key: str | None = None, tls_cert: Path | None = None) -> "Iterator[ElasticClient]":
        """Connect to ``server`` (HOST:PORT), over TLS if ``tls_cert`` (the PEM certificate to trust) is given.

        ``key`` is the service's key for elastic serving, if it asks for one. Nothing is sent before the first call.
        """
        if tls_cert is None:
            # A proxy named in the environment is for other machines; without TLS it would also read the key.
            options = [("grpc.enable_http_proxy", 0)] if server.rpartition(":")[0] in _LOOPBACK else []
            channel = grpc.insecure_channel(server, options)
        else:
            channel = grpc.secure_channel(server, grpc.ssl_channel_credentials(tls_cert.read_bytes()))
        with channel:
            yield ElasticClient(pb_grpc.ElasticServiceStub(channel), key)

    def register(self, spec: TaskSpec, weights: bytes) -> pb.RegisteredTask:
        messages = registration(spec, weights)
        with _errors():
            reply: pb.RegisterTaskResponse
            reply = self.stub.RegisterTask(messages, metadata=self._metadata, timeout=_TIMEOUT_S)
        return reply.task

    def image_px(self) -> int:
        """Return the side of the square pictures that the server's model reads; 0 if the server is too old to say."""
        with _errors():
            listed = self.stub.ListTasks(pb.ListTasksRequest(), metadata=self._metadata, timeout=_TIMEOUT_S)
            return int(listed.image_px)

    def tasks(self) -> list[pb.RegisteredTask]:
        with _errors():
            return list(self.stub.ListTasks(pb.ListTasksRequest(), metadata=self._metadata, timeout=_TIMEOUT_S).tasks)

    def remove(self, name: str) -> None:
        with _errors():
            self.stub.RemoveTask(pb.RemoveTaskRequest(name=name), metadata=self._metadata, timeout=_TIMEOUT_S)

    def query(
        self,
        task: str,
        encoded: bytes,
        *,
        latency_s: float = 0.0,
        utility: float | None = None,
        gamma: int | None = None,
        min_accuracy: float | None = None,
    ) -> pb.MakeQueryResponse:
        """Classify one image, the bytes of a JPEG or PNG file, and return class, gamma and times.

        ``latency_s``: seconds until the answer must be there; 0 takes the task's default. ``utility``: the worth of a
        correct answer in time; None takes the task's default. ``gamma`` fixes the gamma, and ``min_accuracy`` permits
        only gammas with at least this accuracy. Raises TooLarge before sending a picture that no message can hold.
        """
        request = pb.MakeQueryRequest(task=task, encoded=encoded, latency_s=latency_s)
        if utility is not None:
            request.utility = utility
        if gamma is not None:
            request.gamma = gamma
        if min_accuracy is not None:
            request.min_accuracy = min_accuracy
        if request.ByteSize() > MAX_IMAGE_MESSAGE_BYTES:
            most_mib = MAX_IMAGE_MESSAGE_BYTES >> 20
            raise TooLarge(f"the picture has {len(encoded)} bytes; a message holds {most_mib} MiB: shrink the picture")
        with _errors():
            reply: pb.MakeQueryResponse
            reply = self.stub.MakeQuery(request, metadata=self._metadata, timeout=_TIMEOUT_S)
        return reply

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.key is None else (("authorization", f"Bearer {self.key}"),)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        names: list[str] = [str(one.value) for one in error.trailing_metadata() or () if one.key == NAME_KEY]
        what = error.details() or "the server cannot be reached"
        raise from_status(error.code().value[0], what, "".join(names[:1])) from error
