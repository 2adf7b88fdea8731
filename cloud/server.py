"""The server: opens database and files, wires the services, starts the worker, and closes everything in reverse order.

There is one server per SQLite database, and any number on one PostgreSQL database. A server runs on asyncio; blocking
work (database, files) runs in threads, and learning runs in worker processes.
"""

import asyncio
import logging
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from prometheus_client import start_http_server

from isthmus.cloud import continuity, tracing
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.identity import Gate
from isthmus.cloud.inference import HeadCache
from isthmus.cloud.metrics import calls as call_metrics
from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.metrics.elastic import ElasticCollector
from isthmus.cloud.metrics.generation import GenerationCollector
from isthmus.cloud.metrics.jobs import JobCollector
from isthmus.cloud.metrics.tenants import TenantCollector
from isthmus.cloud.offer import Offer, offer_of
from isthmus.cloud.personalise import students
from isthmus.cloud.personalise.signing import Signer
from isthmus.cloud.personalise.students import Shelf
from isthmus.cloud.personalise.supervisor import Supervisor
from isthmus.cloud.rpc import transport
from isthmus.cloud.rpc.calls import CallInterceptor
from isthmus.cloud.rpc.elastic import ElasticServicer
from isthmus.cloud.rpc.inference import InferenceServicer
from isthmus.cloud.rpc.interrupt import OpenCalls
from isthmus.cloud.rpc.job_watch import JobWatch
from isthmus.cloud.rpc.open_inference import OpenInferenceServicer
from isthmus.cloud.rpc.personalisation import PersonalisationServicer
from isthmus.cloud.rpc.scopes import (
    count_scope,
    devices_calling,
    identity_scope,
    metrics_scope,
    spending,
    status_scope,
    trace_scope,
)
from isthmus.cloud.rpc.work import Work
from isthmus.cloud.settings import CloudSettings, is_loopback, joined, split_listen
from isthmus.cloud.store import devices, lock, release_files
from isthmus.cloud.store.artefacts import Artefacts
from isthmus.cloud.store.database import Database
from isthmus.cloud.tenants.roster import READ_EVERY_S, Roster
from isthmus.data.files import write_atomically
from isthmus.distill.models.heads import HeadBank
from isthmus.distill.release import Release
from isthmus.proto.errors import InvalidInput, IsthmusError, Unauthenticated
from isthmus.proto.open_inference import inference_pb2 as inference_pb
from isthmus.proto.open_inference import inference_pb2_grpc as inference_grpc
from isthmus.proto.v1 import elastic_pb2 as elastic_pb
from isthmus.proto.v1 import elastic_pb2_grpc as elastic_grpc
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from isthmus.cloud.generation.serve.opening import Opened

log = logging.getLogger(__name__)

_GRACE_S: Final = 2.0
_CHECK_RELEASE_S: Final = 24 * 3600.0
_REVOKED_S: Final = READ_EVERY_S
"""How often to look for revoked devices with open calls, and at the tenants."""


@dataclass(frozen=True)
class _Release:
    """What the services for devices need."""

    signer: Signer
    offer: Offer
    gate: Gate
    base_student_id: str


@dataclass(frozen=True)
class _Ground:
    """What the services need. The part of a service that is not offered is None."""

    shelf: Shelf
    roster: Roster
    release: _Release | None
    elastic: Elastic | None
    inference_key: str | None
    """The key of clients that ask models: image tasks, or a language model."""


class Server:
    """One running service. Call ``start`` once and ``stop`` once. Nothing is opened or bound before ``start``.

    >>> async def serve(settings):
    ...     server = Server(settings)
    ...     port = await server.start()
    ...     try:
    ...         return port > 0
    ...     finally:
    ...         await server.stop()
    >>> asyncio.run(serve(CloudSettings(release=release.root, state=folder / "state", workers=0)))
    True
    """

    def __init__(self, settings: CloudSettings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._supervisors: list[Supervisor] = []
        self._metrics = Metrics()
        self._traces = tracing.OFF
        self._calls = OpenCalls()
        self._work = Work()
        self._enrolling = Work(threads=2)
        self.roster: Roster
        """The tenants, once started."""
        self.elastic: Elastic | None = None
        """Elastic serving, once started with ``elastic_model``."""
        self.generation: Opened | None = None
        """What answers requests for text, once started with a language model or upstream servers."""
        self.http_port: int | None = None
        """The port of HTTP, once started with ``http``."""
        self.port: int | None = None
        """The port on which it listens, once started."""
        self.health_port: int | None = None
        """The port of health checks without TLS, once started with ``health_listen``."""
        self.metrics_port: int | None = None
        """Port of the metrics, once started with ``metrics_port``."""

    @property
    def worker_pid(self) -> int | None:
        """Process id of the (first) worker, while there is one."""
        return self._supervisors[0].pid if self._supervisors else None

    async def start(self) -> int:
        """Start to listen and return the port.

        Raises Locked if another server uses the database, InvalidInput (naming the way out) if the settings do not
        work here, and ReleaseError if the release is incomplete. Whatever was opened is then closed again.
        """
        try:
            return await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Give calls a moment to end, then close everything. A job in progress resumes at the next start."""
        await self._stack.aclose()

    async def _start(self) -> int:
        settings = self._settings
        self._traces = tracing.open_traces(settings.traces, settings.traces_share, "isthmus-cloud")
        self._stack.push_async_callback(asyncio.to_thread, self._traces.close)
        ground = await asyncio.to_thread(self._open)
        if settings.workers and ground.release is not None:
            self._supervisors = [
                Supervisor(settings, self._metrics.worker_restarts.inc) for _ in range(settings.workers)
            ]
            for supervisor in self._supervisors:
                self._stack.push_async_callback(supervisor.stop)
        self.roster = ground.roster
        self.elastic = ground.elastic
        if self.elastic is not None:
            self.elastic.live.start()
            self._metrics.watch(ElasticCollector(self.elastic.live))
            self._stack.push_async_callback(asyncio.to_thread, self.elastic.live.stop)
            if self.elastic.measurer is not None:
                self.elastic.measurer.start(self.elastic.registry)
                self._stack.push_async_callback(asyncio.to_thread, self.elastic.measurer.stop)
        if settings.generate.served:
            # Only a server of a language model needs the libraries of the extra "generate".
            from isthmus.cloud.generation.serve.opening import opened

            self.generation = await self._stack.enter_async_context(opened(settings.generate))
            self._metrics.watch(GenerationCollector(self.generation.answering))
        if ground.release is not None:
            self._metrics.watch(JobCollector(ground.shelf.database))
        server, health_servicer = self._wire(ground)
        port = self.port = await self._bind(server)
        await server.start()
        self._stack.push_async_callback(server.stop, _GRACE_S)
        shut_out = asyncio.create_task(
            self._shut_out_revoked(ground.shelf.database, ground.roster, health_servicer), name="revoked devices"
        )
        self._stack.push_async_callback(_cancelled, shut_out)
        if settings.release is not None:
            daily = asyncio.create_task(self._check_release(ground.shelf.database, settings.release), name="release")
            self._stack.push_async_callback(_cancelled, daily)
        self._stack.push_async_callback(health_servicer.enter_graceful_shutdown)
        if settings.http is not None:
            await self._start_http(settings.http)
        for supervisor in self._supervisors:
            await supervisor.start()
        if settings.health_listen is not None:
            await self._start_health(health_servicer, settings.health_listen)
        self._start_metrics()
        if settings.port_file is not None:
            _write_port(settings.port_file, joined(split_listen(settings.listen)[0], port))
        base = "none" if ground.release is None else ground.release.base_student_id
        log.info("listening on port %d, base student %s", port, base)
        return port

    def _start_metrics(self) -> None:
        settings = self._settings
        if settings.metrics_port is None and settings.metrics_listen is None:
            return
        host, port = split_listen(settings.metrics_listen or f"127.0.0.1:{settings.metrics_port}")
        tls: dict[str, Any] = {}
        if not is_loopback(host):
            tls = {
                "certfile": str(settings.tls_cert),
                "keyfile": str(settings.tls_key),
                "client_cafile": str(settings.tls_client_ca),
                "client_auth_required": True,
            }
        try:
            httpd, _ = start_http_server(port, addr=host, registry=self._metrics.registry, **tls)
        except OSError as error:
            raise InvalidInput(f"metrics cannot be served on {joined(host, port)}: {error.strerror}") from error
        self._stack.callback(httpd.server_close)
        self._stack.callback(httpd.shutdown)
        self.metrics_port = httpd.server_port

    async def _start_health(self, servicer: health.aio.HealthServicer, listen: str) -> None:
        """Answer health checks on a port without TLS, where nothing else is answered."""
        options = [("grpc.max_receive_message_length", 1 << 10), ("grpc.max_concurrent_streams", 16)]
        server = grpc.aio.server(options=[*options, ("grpc.max_allowed_incoming_connections", 64)])
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        try:
            self.health_port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise InvalidInput(f"cannot answer health checks on {listen}: the port is taken") from error
        await server.start()
        self._stack.push_async_callback(server.stop, 0.0)

    def _open(self) -> _Ground:
        settings = self._settings
        settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        database = Database(settings.database_url)
        self._stack.callback(database.close)
        self._stack.callback(lock.acquire_folder(settings.state, "server").release)
        database.connect()
        self._stack.callback(lock.acquire(database, "server").release)
        was_empty = database.is_empty()
        database.migrate()
        shelf = Shelf(database, Artefacts(settings.artefacts_url))
        shelf.artefacts.check()
        continuity.same_database(
            database, settings.state, settings.signing_key_path, shelf.artefacts, was_empty=was_empty
        )
        continuity.mark(database, settings.state, shelf.artefacts)
        try:
            gate = Gate(settings.enrolment_key(), settings.max_devices, settings.max_enrolments_per_hour)
            inference_key = settings.elastic_key() or settings.generate_key()
        except (OSError, ValueError) as error:
            raise InvalidInput(f"key file: {error}") from error
        release = None if settings.release is None else self._open_release(settings.release, shelf, gate)
        roster = Roster(database)
        roster.refresh()
        self._stack.callback(_last_words, roster)
        return _Ground(shelf, roster, release, self._open_elastic(shelf), inference_key)

    def _open_release(self, folder: Path, shelf: Shelf, gate: Gate) -> _Release:
        signer = continuity.same_key(shelf.database, self._settings.signing_key_path)
        release = Release.open(folder)
        pinned = release_files.is_pinned(shelf.database) and not self._settings.accept_release
        if pinned:
            release_files.check(shelf.database, folder)
        offer = offer_of(release)
        base_student_id = students.publish_base(shelf, signer, offer, time.time())
        if not pinned:
            release_files.pin(shelf.database, folder, release.files())
        return _Release(signer, offer, gate, base_student_id)

    def _open_elastic(self, shelf: Shelf) -> Elastic | None:
        settings = self._settings.elastic
        if settings is None:
            return None
        # A server for devices alone does not need timm.
        from isthmus.cloud.elastic.serve.host import open_elastic

        elastic = open_elastic(settings, shelf.database, shelf.artefacts)
        self._stack.callback(elastic.decoder.close)
        if elastic.warm is not None:
            self._stack.callback(elastic.warm.close)
        return elastic

    async def _start_http(self, listen: str) -> None:
        from isthmus.cloud.http.server import HttpServer, under_prefix

        settings = self._settings
        openai = inference = None
        if self.generation is not None:
            from isthmus.cloud.http.openai import openai_app

            openai = openai_app(self.generation.answering, settings.generate_key())
        if self.elastic is not None:
            from isthmus.cloud.http.open_inference import inference_app

            inference = inference_app(self.elastic, settings.elastic_key())
        app = under_prefix("/v2", inference, openai)
        host, port = split_listen(listen)
        server = HttpServer(app, host, port, tls_cert=settings.tls_cert, tls_key=settings.tls_key)
        self.http_port = await server.start()
        self._stack.push_async_callback(server.stop)
        log.info("listening for HTTP on port %d", self.http_port)

    def _wire(self, ground: _Ground) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
        settings = self._settings
        database = ground.shelf.database
        for work in (self._work, self._enrolling):
            work.start()
            self._stack.push_async_callback(work.stop)
        for name, text, value in (
            ("isthmus_calls_open", "Calls of known callers in progress.", lambda: float(len(self._calls))),
            ("isthmus_work_waiting", "Pieces of work waiting for a thread.", lambda: float(self._work.waiting)),
            ("isthmus_event_loop_late_seconds", "How late the event loop is.", lambda: self._work.late_s),
        ):
            self._metrics.gauge(name, text, value)
        roster = ground.roster
        self._metrics.watch(TenantCollector(roster))
        count = count_scope(self._calls, most=settings.max_calls, most_per_device=settings.max_calls_per_device)
        scopes = (
            trace_scope(self._traces),
            metrics_scope(self._metrics),
            status_scope,
            identity_scope(database, self._work, roster, ground.inference_key),
        )
        server = grpc.aio.server(
            interceptors=[CallInterceptor(scopes, count, spending(roster))],
            options=transport.options(settings.max_connections, elastic=ground.elastic is not None),
        )
        files: list[Any] = []
        if ground.release is not None:
            self._add_release(server, ground, ground.release)
            files.append(pb.DESCRIPTOR)
        if ground.elastic is not None:
            servicer = ElasticServicer(ground.elastic, settings.state / "scratch", roster)
            elastic_grpc.add_ElasticServiceServicer_to_server(servicer, server)
            files.append(elastic_pb.DESCRIPTOR)
        inference = self._inference(ground)
        if inference is not None:
            inference_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)
            files.append(inference_pb.DESCRIPTOR)
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        call_metrics.know(files)
        services = [service.full_name for file in files for service in file.services_by_name.values()]
        # Each protocol has a descriptor pool of its own (see proto/generate.py). Reflection shows them as one.
        pool = DescriptorPool()
        for file in (*files, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
            pool.AddSerializedFile(file.serialized_pb)
        names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server, pool=pool)
        return server, health_servicer

    def _add_release(self, server: grpc.aio.Server, ground: _Ground, release: _Release) -> None:
        settings, shelf = self._settings, ground.shelf
        watch = JobWatch(shelf.database, settings.watch_interval_s)
        self._stack.push_async_callback(watch.stop)
        personalisation = PersonalisationServicer(
            shelf=shelf,
            offer=release.offer,
            gate=release.gate,
            roster=ground.roster,
            signer=release.signer,
            key_changes=continuity.key_changes(shelf.database),
            metrics=self._metrics,
            work=self._work,
            enrolling=self._enrolling,
            tell_worker=self._tell_worker,
            max_queued_jobs=settings.max_queued_jobs,
            watch=watch,
            work_dir=settings.work_dir,
        )
        cache = HeadCache(shelf, HeadBank.load, scratch=settings.state / "scratch", capacity=settings.cached_heads)
        pb_grpc.add_PersonalisationServiceServicer_to_server(personalisation, server)
        inference = InferenceServicer(cache, release.offer, self._metrics, ground.roster)
        pb_grpc.add_InferenceServiceServicer_to_server(inference, server)

    def _inference(self, ground: _Ground) -> inference_grpc.GRPCInferenceServiceServicer | None:
        """Return the servicer of the Open Inference Protocol; None if no model is asked."""
        tasks = None if ground.elastic is None else OpenInferenceServicer(ground.elastic, ground.roster)
        if self.generation is None:
            return tasks
        from isthmus.cloud.rpc.generation import GenerationServicer

        return GenerationServicer(self.generation.answering, tasks)

    async def _bind(self, server: grpc.aio.Server) -> int:
        settings = self._settings
        try:
            if settings.tls_cert is None or settings.tls_key is None:
                return int(server.add_insecure_port(settings.listen))
            certificates = transport.Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
            self._metrics.gauge(
                "isthmus_tls_certificate_expiry_timestamp_seconds",
                "When the TLS certificate in use ends.",
                lambda: certificates.expires_s,
            )
            return int(server.add_secure_port(settings.listen, certificates.credentials()))
        except RuntimeError as error:
            raise InvalidInput(
                f"cannot listen on {settings.listen}: the port is taken, or the address is not one of this machine"
            ) from error

    async def _shut_out_revoked(
        self, database: Database, roster: Roster, health_servicer: health.aio.HealthServicer
    ) -> None:
        """End the open calls of devices that have been revoked; read the tenants again.

        Report that nothing is served without the database.
        """
        status = health_pb2.HealthCheckResponse
        while True:
            await asyncio.sleep(_REVOKED_S)
            try:
                revoked = await asyncio.to_thread(devices.revoked_among, database, devices_calling(self._calls))
                await asyncio.to_thread(roster.refresh)
            except IsthmusError as error:
                log.warning("revoked devices are not known at the moment: %s", error)
                await health_servicer.set("", status.NOT_SERVING)
                continue
            await health_servicer.set("", status.SERVING)
            self._calls.end(revoked, Unauthenticated("this device was revoked; enrol it again"))

    async def _check_release(self, database: Database, release: Path) -> None:
        """Compare the release's files with their hashes once a day; a worker that runs on changed ones is replaced.

        The next worker compares them too, and works on no job until they are restored.
        """
        while True:
            await asyncio.sleep(_CHECK_RELEASE_S)
            try:
                await asyncio.to_thread(release_files.check, database, release)
            except IsthmusError as error:
                log.error("%s", error)
                for supervisor in self._supervisors:
                    supervisor.replace()

    def _tell_worker(self) -> None:
        for supervisor in self._supervisors:
            supervisor.tell()


def _last_words(roster: Roster) -> None:
    """Write what tenants have spent since the last time, if the database is there."""
    with suppress(IsthmusError):
        roster.refresh()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _write_port(path: Path, address: str) -> None:
    """Write the file atomically, so that a reader that waits for it never sees half of it."""
    write_atomically(path, f"{address}\n")
