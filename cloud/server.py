"""The server: opens what it needs, wires the services, starts the worker, and closes everything in reverse order.

There is one server per SQLite database, and any number on one PostgreSQL database. A server runs on asyncio; blocking
work (database, files) runs in threads, and learning runs in worker processes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpc_health.v1 import health, health_pb2

from isthmus.cloud import tracing
from isthmus.cloud.elastic.serve.serving import Elastic
from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.metrics.elastic import ElasticCollector
from isthmus.cloud.metrics.generation import GenerationCollector
from isthmus.cloud.metrics.jobs import JobCollector
from isthmus.cloud.metrics.releases import ReleaseCollector
from isthmus.cloud.personalise.supervisor import Supervisor
from isthmus.cloud.releases import files as release_files
from isthmus.cloud.rpc.interrupt import OpenCalls
from isthmus.cloud.rpc.scopes import devices_calling
from isthmus.cloud.service import ports
from isthmus.cloud.service.ground import Ground, open_ground
from isthmus.cloud.service.wiring import Services
from isthmus.cloud.settings import CloudSettings, joined, split_listen
from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from isthmus.cloud.tenants.roster import READ_EVERY_S, Roster
from isthmus.data.files import write_atomically
from isthmus.proto.errors import IsthmusError, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from isthmus.cloud.generation.serve.opening import Opened

log = logging.getLogger(__name__)

_GRACE_S: Final = 2.0
_CHECK_RELEASE_S: Final = 24 * 3600.0
_REVOKED_S: Final = READ_EVERY_S
"""How often to look for revoked devices with open calls, and at the tenants."""


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

    def __init__(self, settings: CloudSettings, *, when_ready: Callable[[], None] = lambda: None) -> None:
        """``when_ready`` is called when everything is open, before the port is written down and logged."""
        self._settings = settings
        self._when_ready = when_ready
        self._stack = AsyncExitStack()
        self._supervisors: list[Supervisor] = []
        self._metrics = Metrics()
        self._traces = tracing.OFF
        self._calls = OpenCalls()
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
        ground = await asyncio.to_thread(open_ground, settings, self._stack)
        if settings.workers and ground.release is not None:
            self._supervisors = [
                Supervisor(settings, self._metrics.worker_restarts.inc) for _ in range(settings.workers)
            ]
            for supervisor in self._supervisors:
                self._stack.push_async_callback(supervisor.stop)
        await self._start_models(ground)
        if ground.release is not None:
            self._metrics.watch(JobCollector(ground.shelf.database))
            self._metrics.watch(ReleaseCollector(ground.shelf.database))
        answering = None if self.generation is None else self.generation.answering
        services = Services(
            settings, ground, answering, self._stack, self._metrics, self._traces, self._calls, self._tell_worker
        )
        server, health_servicer = services.wire()
        port = self.port = ports.bind(server, settings, self._metrics)
        await server.start()
        answering_ends: list[Callable[[], Awaitable[object]]] = [partial(server.stop, _GRACE_S)]
        self._stack.push_async_callback(self._stop_answering, answering_ends)
        shut_out = asyncio.create_task(
            self._shut_out_revoked(ground.shelf.database, ground.roster, health_servicer), name="revoked devices"
        )
        self._stack.push_async_callback(_cancelled, shut_out)
        if settings.release is not None:
            daily = asyncio.create_task(self._check_release(ground.shelf.database, settings.release), name="release")
            self._stack.push_async_callback(_cancelled, daily)
        self._stack.push_async_callback(health_servicer.enter_graceful_shutdown)
        if settings.http is not None:
            self.http_port, end_http = await ports.serve_http(settings.http, settings, ground, self.generation)
            answering_ends.append(end_http)
        for supervisor in self._supervisors:
            await supervisor.start()
        if settings.health_listen is not None:
            self.health_port = await ports.serve_health(health_servicer, settings.health_listen, self._stack)
        self.metrics_port = ports.serve_metrics(settings, self._metrics, self._stack)
        self._when_ready()
        if settings.port_file is not None:
            _write_port(settings.port_file, joined(split_listen(settings.listen)[0], port))
        base = "none" if ground.release is None else ground.release.base_student_id
        log.info("listening on port %d, base student %s", port, base)
        return port

    async def _stop_answering(self, ends: Sequence[Callable[[], Awaitable[object]]]) -> None:
        """Tell the callers of all streams, so that they go to another server at once. Then end gRPC and HTTP together.

        Each gives its calls a moment to end. If one of them fails, the other one still ends first.
        """
        self._calls.close(Unavailable("this server stops; connect again"))
        for error in await asyncio.gather(*(end() for end in ends), return_exceptions=True):
            if isinstance(error, BaseException):
                raise error

    async def _start_models(self, ground: Ground) -> None:
        self.roster = ground.roster
        self.elastic = ground.elastic
        if self.elastic is not None:
            self.elastic.start()
            self._metrics.watch(ElasticCollector(self.elastic.live, self.elastic.variants))
            self._stack.push_async_callback(asyncio.to_thread, self.elastic.stop)
            if self.elastic.measurer is not None:
                self.elastic.measurer.start()
                self._stack.push_async_callback(asyncio.to_thread, self.elastic.measurer.stop)
        if self._settings.generate.served:
            # Only a server of a language model needs the libraries of the extra "generate".
            from isthmus.cloud.replicas.opening import opened

            self.generation = await self._stack.enter_async_context(opened(self._settings.generate))
            self._metrics.watch(GenerationCollector(self.generation.answering))

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


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _write_port(path: Path, address: str) -> None:
    """Write the file atomically, so that a reader that waits for it never sees half of it."""
    write_atomically(path, f"{address}\n")
