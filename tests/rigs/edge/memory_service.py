"""A cloud in memory behind gRPC, on a free port of this machine: real messages over real sockets, no learning."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from isthmus.edge.link.interface import MemoryCloud, MemoryLink
from isthmus.proto import convert, convert_student
from isthmus.proto.errors import NAME_KEY, IsthmusError
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as rpc

STATUS = {code.value[0]: code for code in grpc.StatusCode}


class Servicer(rpc.PersonalisationServiceServicer, rpc.InferenceServiceServicer):
    """The memory cloud behind gRPC: a new MemoryLink answers each call."""

    def __init__(self, cloud: MemoryCloud) -> None:
        self.cloud = cloud
        self.stall = threading.Event()
        self.stall.set()

    def Enrol(self, request: Any, context: Any) -> Any:
        return self._do(
            context, lambda link: convert.enrolment_to_pb(link.enrol(request.device_name, request.enrolment_key))
        )

    def StartPersonalisation(self, request: Any, context: Any) -> Any:
        def start(link: MemoryLink) -> Any:
            prototypes = convert.prototypes_from_pb(request.prototypes)
            status = link.start_personalisation(
                request.idempotency_key, prototypes, rounds=request.rounds, seed=request.seed
            )
            return pb.StartPersonalisationResponse(job=convert.job_status_to_pb(status))

        return self._do(context, start)

    def UploadPrototypes(self, request: Any, context: Any) -> Any:
        def upload(link: MemoryLink) -> Any:
            status = link.upload_prototypes(
                request.job_id, request.round, convert.prototypes_from_pb(request.prototypes)
            )
            return pb.UploadPrototypesResponse(job=convert.job_status_to_pb(status))

        return self._do(context, upload)

    def WatchJob(self, request: Any, context: Any) -> Iterator[Any]:
        statuses = self._do(context, lambda link: list(link.watch_job(request.job_id)))
        return (pb.WatchJobResponse(job=convert.job_status_to_pb(status)) for status in statuses)

    def Forget(self, request: Any, context: Any) -> Any:
        self._do(context, lambda link: link.forget())
        return pb.ForgetResponse()

    def DescribeStudent(self, request: Any, context: Any) -> Any:
        return self._do(
            context, lambda link: convert_student.signed_manifest_to_pb(link.describe_student(request.student_id))
        )

    def FetchStudent(self, request: Any, context: Any) -> Iterator[Any]:
        chunks = self._do(
            context, lambda link: list(link.fetch_file(request.student_id, request.file_name, request.offset_bytes))
        )
        return (convert_student.chunk_to_pb(chunk) for chunk in chunks)

    def Infer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        student_id = dict(context.invocation_metadata())["isthmus-student"]
        session = self._do(context, lambda link: link.open_infer(student_id, timeout_s=1))
        for request in requests:
            self.stall.wait(timeout=20)
            if not self.cloud.reachable:
                context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
            yield convert.infer_reply_to_pb(session.ask(request.sequence, request.frame, timeout_s=1))

    def _do(self, context: Any, call: Callable[[MemoryLink], Any]) -> Any:
        link = MemoryLink(self.cloud)
        link.authenticate(dict(context.invocation_metadata()).get("authorization", "").removeprefix("Bearer "))
        try:
            return call(link)
        except IsthmusError as error:
            context.set_trailing_metadata(((NAME_KEY, type(error).__name__),))
            context.abort(STATUS[error.code], str(error))


@contextmanager
def served(cloud: MemoryCloud, *, threads: int = 4) -> Iterator[tuple[int, Servicer]]:
    """Serve the cloud; yield its port and the servicer."""
    servicer = Servicer(cloud)
    server = grpc.server(ThreadPoolExecutor(threads))
    rpc.add_PersonalisationServiceServicer_to_server(servicer, server)
    rpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port, servicer
    finally:
        servicer.stall.set()
        server.stop(None).wait()
