"""PersonalisationService on the wire: map the request, call a plain function off the event loop, map the reply."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from isthmus.cloud import identity, tracing
from isthmus.cloud.identity import Gate, WrongKey
from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.personalise import service, students
from isthmus.cloud.personalise.forgetting import forget_device
from isthmus.cloud.personalise.job import Job, status
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.releases.catalogue import Catalogue
from isthmus.cloud.rpc.job_watch import JobWatch
from isthmus.cloud.rpc.scopes import caller
from isthmus.cloud.rpc.transport import identity_of
from isthmus.cloud.rpc.work import Work
from isthmus.cloud.store import releases
from isthmus.cloud.store.devices import Device
from isthmus.cloud.store.tenants import DEFAULT, OverQuota
from isthmus.cloud.tenants.roster import Roster
from isthmus.cloud.wrong_keys import WrongKeys
from isthmus.proto import checks, convert, convert_student
from isthmus.proto.errors import InvalidInput, IsthmusError, Unauthenticated
from isthmus.proto.messages import Chunk, Enrolment, SignedKeyChange, SignedManifest
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PersonalisationServicer(pb_grpc.PersonalisationServiceServicer):
    """Maps PersonalisationService to plain functions. ``tell_worker`` is called when there is new work.

    ``work`` runs what devices ask for; ``enrolling`` has threads of its own, so that a flood of enrolments delays no
    enrolled device.
    """

    shelf: Shelf
    catalogue: Catalogue
    gate: Gate
    roster: Roster
    signer: Signer
    key_changes: tuple[SignedKeyChange, ...]
    metrics: Metrics
    work: Work
    enrolling: Work
    tell_worker: Callable[[], None]
    max_queued_jobs: int
    watch: JobWatch
    work_dir: Path
    wrong_keys: WrongKeys = field(default_factory=WrongKeys)

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolResponse:
        address = context.peer().rpartition(":")[0]
        self.wrong_keys.admit(address)
        try:
            enrolment = await self._enrol(request, identity_of(context))
        except WrongKey as error:
            self.roster.refuse(DEFAULT, "enrolment key")
            wait_s = self.wrong_keys.begin(address)
            try:
                await asyncio.sleep(wait_s)
            finally:
                self.wrong_keys.end(address)
            raise Unauthenticated(str(error)) from error
        log.info("a device enrolled")  # Not which: the log cannot forget it. 'isthmus cloud devices' lists them.
        return convert.enrolment_to_pb(enrolment)

    async def _enrol(self, request: pb.EnrolRequest, certificate: str | None) -> Enrolment:
        return await self.enrolling.do(
            identity.enrol,
            self.shelf.database,
            self.gate,
            lambda device_id: self.catalogue.offered(device_id).offer,
            self.signer.public_key,
            device_name=request.device_name,
            enrolment_key=request.enrolment_key,
            now_s=self.shelf.database.now_s(),
            new_secret=lambda: (secrets.token_hex(8), secrets.token_urlsafe(32)),
            roster=self.roster,
            certificate=certificate,
        )

    async def Forget(self, request: pb.ForgetRequest, context: Any) -> pb.ForgetResponse:
        await self.work.do(forget_device, self.shelf, self.work_dir, caller().device_id)
        log.info("a device was erased at its own wish")
        return pb.ForgetResponse()

    async def StartPersonalisation(
        self, request: pb.StartPersonalisationRequest, context: Any
    ) -> pb.StartPersonalisationResponse:
        within = tracing.current()
        try:
            job = await self._start(request, "" if within is None else within.header)
        except OverQuota:
            self.roster.refuse(caller().tenant, "jobs")
            raise
        self.tell_worker()
        return pb.StartPersonalisationResponse(job=convert.job_status_to_pb(status(job)))

    async def _start(self, request: pb.StartPersonalisationRequest, trace: str) -> Job:
        return await self.work.do(
            service.start,
            self.catalogue,
            caller().device_id,
            idempotency_key=request.idempotency_key,
            prototypes=convert.prototypes_from_pb(request.prototypes),
            rounds=request.rounds,
            seed=request.seed,
            now_s=self.shelf.database.now_s(),
            new_id=lambda: secrets.token_hex(8),
            at_most_waiting=self.max_queued_jobs,
            tenant=caller().tenant,
            at_most_a_day=self.roster.quotas(caller().tenant).jobs_per_day,
            trace=trace,
        )

    async def UploadPrototypes(self, request: pb.UploadPrototypesRequest, context: Any) -> pb.UploadPrototypesResponse:
        job = await self.work.do(
            service.upload,
            self.catalogue,
            caller().device_id,
            job_id=checks.identifier("job", request.job_id),
            round=request.round,
            prototypes=convert.prototypes_from_pb(request.prototypes),
            now_s=self.shelf.database.now_s(),
        )
        self.tell_worker()
        return pb.UploadPrototypesResponse(job=convert.job_status_to_pb(status(job)))

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        job_id = checks.identifier("job", request.job_id)
        job = await self.work.do(service.get, self.shelf.database, caller().device_id, job_id)
        async with aclosing(self.watch.changes(job)) as changes:
            async for changed in changes:
                yield pb.WatchJobResponse(job=convert.job_status_to_pb(status(changed)))

    async def DescribeStudent(self, request: pb.DescribeStudentRequest, context: Any) -> pb.DescribeStudentResponse:
        signed = await self.work.do(self._describe, caller(), request.student_id, request.offered)
        return convert_student.signed_manifest_to_pb(replace(signed, key_changes=self.key_changes))

    def _describe(self, device: Device, student_id: str, base: bool) -> SignedManifest:
        if student_id and base:
            raise InvalidInput("name a student, or ask for the base student that is offered")
        offered = self.catalogue.offered(device.device_id)
        row = students.described_row(self.shelf, offered, device.device_id, student_id, base=base)
        signed = students.describe(self.shelf, self.signer, offered, row, self.shelf.database.now_s())
        # A look at what is offered is no use of it, and an interim student makes prototypes only.
        if not base and row.kind != "interim" and row.release not in ("", device.release):
            # No reason to refuse a call that only reads: it is recorded when the student answers.
            with suppress(IsthmusError):
                releases.uses(self.shelf.database, device.device_id, row.release)
        return signed

    async def FetchStudent(
        self, request: pb.FetchStudentRequest, context: Any
    ) -> AsyncIterator[pb.FetchStudentResponse]:
        file = await self.work.do(
            students.check_fetch,
            self.shelf,
            caller().device_id,
            request.student_id,
            request.file_name,
            request.offset_bytes,
        )
        chunks = students.chunks(self.shelf, request.student_id, file, request.offset_bytes)
        try:
            while (chunk := await asyncio.to_thread(_next, chunks)) is not None:
                self.roster.spend(caller().tenant, len(chunk.data))
                yield convert_student.chunk_to_pb(chunk)
                self.metrics.bytes_sent.inc(len(chunk.data))
        finally:
            await asyncio.to_thread(_close, chunks)


def _next(chunks: Iterator[Chunk]) -> Chunk | None:
    return next(chunks, None)


def _close(chunks: Any) -> None:
    chunks.close()
