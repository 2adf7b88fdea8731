"""The gRPC services of a server, wired to what was opened: one server, its interceptors, health and reflection."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from isthmus.cloud import continuity
from isthmus.cloud.inference import HeadCache
from isthmus.cloud.metrics import calls as call_metrics
from isthmus.cloud.metrics.calls import Metrics
from isthmus.cloud.metrics.tenants import TenantCollector
from isthmus.cloud.rpc import transport
from isthmus.cloud.rpc.calls import CallInterceptor
from isthmus.cloud.rpc.door import Door
from isthmus.cloud.rpc.elastic import ElasticServicer
from isthmus.cloud.rpc.inference import InferenceServicer
from isthmus.cloud.rpc.interrupt import OpenCalls
from isthmus.cloud.rpc.job_watch import JobWatch
from isthmus.cloud.rpc.open_inference import OpenInferenceServicer
from isthmus.cloud.rpc.personalisation import PersonalisationServicer
from isthmus.cloud.rpc.scopes import count_scope, identity_scope, metrics_scope, spending, status_scope, trace_scope
from isthmus.cloud.rpc.work import Work
from isthmus.cloud.service.ground import Ground, OpenRelease
from isthmus.cloud.settings import CloudSettings
from isthmus.cloud.tracing import Traces
from isthmus.distill.models.heads import FrozenHeads, HeadBank
from isthmus.proto.open_inference import inference_pb2 as inference_pb
from isthmus.proto.open_inference import inference_pb2_grpc as inference_grpc
from isthmus.proto.v1 import elastic_pb2 as elastic_pb
from isthmus.proto.v1 import elastic_pb2_grpc as elastic_grpc
from isthmus.proto.v1 import isthmus_pb2 as pb
from isthmus.proto.v1 import isthmus_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from isthmus.cloud.generation.serve.serving import Answering


@dataclass
class Services:
    """The services of one server. ``calls``: those in progress. ``tell_worker`` says that there is a new job."""

    settings: CloudSettings
    ground: Ground
    answering: "Answering | None"
    """What answers requests for text, if anything does."""
    stack: AsyncExitStack
    metrics: Metrics
    traces: Traces
    calls: OpenCalls
    tell_worker: Callable[[], None]
    _work: Work = field(default_factory=Work, init=False)
    _enrolling: Work = field(default_factory=lambda: Work(threads=2), init=False)

    def wire(self) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
        """Return the server, not yet bound, and the servicer of health checks."""
        settings, ground = self.settings, self.ground
        database = ground.shelf.database
        for work in (self._work, self._enrolling):
            work.start()
            self.stack.push_async_callback(work.stop)
        for name, text, value in (
            ("isthmus_calls_open", "Calls of known callers in progress.", lambda: float(len(self.calls))),
            ("isthmus_work_waiting", "Pieces of work waiting for a thread.", lambda: float(self._work.waiting)),
            ("isthmus_event_loop_late_seconds", "How late the event loop is.", lambda: self._work.late_s),
        ):
            self.metrics.gauge(name, text, value)
        roster = ground.roster
        self.metrics.watch(TenantCollector(roster))
        count = count_scope(self.calls, most=settings.max_calls, most_per_device=settings.max_calls_per_device)
        door = Door(roster, self.metrics)
        scopes = (
            trace_scope(self.traces),
            metrics_scope(self.metrics),
            status_scope,
            identity_scope(database, self._work, roster, door, ground.inference_key),
        )
        server = grpc.aio.server(
            interceptors=[CallInterceptor(scopes, count, door, self.calls, spending(roster))],
            options=transport.options(settings.max_connections, elastic=ground.elastic is not None),
        )
        files: list[Any] = []
        if ground.release is not None:
            self._add_release(server, ground.release)
            files.append(pb.DESCRIPTOR)
        if ground.elastic is not None:
            servicer = ElasticServicer(ground.elastic, settings.state / "scratch", roster)
            elastic_grpc.add_ElasticServiceServicer_to_server(servicer, server)
            files.append(elastic_pb.DESCRIPTOR)
        inference = self._inference()
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

    def _add_release(self, server: grpc.aio.Server, release: OpenRelease) -> None:
        settings, ground = self.settings, self.ground
        shelf = ground.shelf
        watch = JobWatch(shelf.database, settings.watch_interval_s)
        self.stack.push_async_callback(watch.stop)
        personalisation = PersonalisationServicer(
            shelf=shelf,
            catalogue=release.catalogue,
            gate=release.gate,
            roster=ground.roster,
            signer=release.signer,
            key_changes=continuity.key_changes(shelf.database),
            metrics=self.metrics,
            work=self._work,
            enrolling=self._enrolling,
            tell_worker=self.tell_worker,
            max_queued_jobs=settings.max_queued_jobs,
            watch=watch,
            work_dir=settings.work_dir,
        )
        cache = HeadCache(shelf, _heads, scratch=settings.state / "scratch", capacity=settings.cached_heads)
        pb_grpc.add_PersonalisationServiceServicer_to_server(personalisation, server)
        inference = InferenceServicer(cache, shelf.database, self.metrics, ground.roster)
        pb_grpc.add_InferenceServiceServicer_to_server(inference, server)

    def _inference(self) -> inference_grpc.GRPCInferenceServiceServicer | None:
        """Return the servicer of the Open Inference Protocol; None if no model is asked."""
        ground = self.ground
        tasks = None if ground.elastic is None else OpenInferenceServicer(ground.elastic, ground.roster)
        if self.answering is None:
            return tasks
        from isthmus.cloud.rpc.generation import GenerationServicer

        return GenerationServicer(self.answering, tasks)


def _heads(path: Path) -> FrozenHeads:
    return HeadBank.load(path).frozen()
