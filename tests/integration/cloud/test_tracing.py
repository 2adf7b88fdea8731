"""A trace from the device's call through queue, batch and worker, as a collector of OpenTelemetry receives it."""

import asyncio
import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from isthmus.cloud.logs import JsonLines, TextLines
from isthmus.cloud.personalise.worker import Worker
from isthmus.edge.link.over_grpc import GrpcLink
from isthmus.proto.trace import TraceContext
from isthmus.proto.v1 import elastic_pb2 as elastic_pb
from isthmus.proto.v1 import elastic_pb2_grpc as elastic_grpc
from isthmus.proto.v1 import isthmus_pb2 as pb
from tests.rigs.cloud.service import Rig
from tests.rigs.elastic.server import THREE, ElasticRig, pixels, png
from tests.rigs.project.system import missing

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


@dataclass
class Collector:
    """Takes spans as an OpenTelemetry collector does. ``wait_for`` returns them by name."""

    port: int = 0
    spans: list[Any] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, request: Any) -> None:
        with self.changed:
            for resource in request.resource_spans:
                named = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [(named["service.name"], span) for span in scope.spans]
            self.changed.notify_all()

    def wait_for(self, *names: str) -> dict[str, list[tuple[str, Any]]]:
        def found() -> dict[str, list[tuple[str, Any]]]:
            return {name: [each for each in self.spans if each[1].name == name] for name in names}

        with self.changed:
            assert self.changed.wait_for(lambda: all(found().values()), 300), {span.name for _, span in self.spans}
            return found()


@pytest.fixture
def collector() -> Iterator[Collector]:
    try:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
    except ModuleNotFoundError:
        missing("OpenTelemetry is not installed: pip install 'isthmus[otel]'")
    seen = Collector()

    def export(request: Any, context: Any) -> Any:
        seen.take(request)
        return otlp.ExportTraceServiceResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        export, otlp.ExportTraceServiceRequest.FromString, otlp.ExportTraceServiceResponse.SerializeToString
    )

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return handler if details.method == EXPORT else None

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handlers()])
    seen.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield seen
    server.stop(None)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OTEL_BSP_SCHEDULE_DELAY", "50")


def test_a_trace_leads_from_the_device_through_queue_batch_and_worker(
    collector: Collector, tiny_release: Path, tmp_path: Path
) -> None:
    image = ElasticRig(tmp_path)
    endpoint = f"http://127.0.0.1:{collector.port}"
    query, start, watch = TraceContext.new(), TraceContext.new(), TraceContext.new()

    async def scenario() -> None:
        rig = Rig(tiny_release, tmp_path / "state")
        async with image.running(THREE[0], release=tiny_release, workers=0, traces=endpoint) as (_, channel):
            device = await rig.enrol(channel)
            asked = elastic_pb.MakeQueryRequest(task="ten", encoded=png(pixels(0)))
            await elastic_grpc.ElasticServiceStub(channel).MakeQuery(asked, metadata=(("traceparent", query.header),))
            request = pb.StartPersonalisationRequest(idempotency_key="k", prototypes=rig.prototypes(), rounds=1, seed=1)
            metadata = (*device.metadata, ("traceparent", start.header))
            job = (await device.personalisation.StartPersonalisation(request, metadata=metadata)).job
            # The watch stays open, and is recorded all the same.
            watching = device.personalisation.WatchJob(
                pb.WatchJobRequest(job_id=job.job_id), metadata=(*device.metadata, ("traceparent", watch.header))
            )
            assert (await watching.read()).job.job_id == job.job_id
            opened = await asyncio.to_thread(collector.wait_for, "isthmus.v1.PersonalisationService/WatchJob")
            assert [span.trace_id.hex() for _, span in opened.popitem()[1]] == [watch.trace_id]
            watching.cancel()

    asyncio.run(scenario())
    worker = Worker(Rig(tiny_release, tmp_path / "state").settings(traces=endpoint))
    while worker.run_once():
        pass
    worker.traces.close()
    worker.database.close()
    call, begun = "isthmus.v1.ElasticService/MakeQuery", "isthmus.v1.PersonalisationService/StartPersonalisation"
    steps = ("select", "distil", "trainheads", "export")
    found = collector.wait_for(call, "queue", "batch", begun, "personalise", *steps)
    ((service, asked),) = found[call]
    assert (service, asked.trace_id.hex(), asked.parent_span_id.hex()) == (
        "isthmus-cloud",
        query.trace_id,
        query.span_id,
    )
    ((_, queue),), ((_, batch),) = found["queue"], found["batch"]
    assert {queue.parent_span_id, batch.parent_span_id} == {asked.span_id}
    assert asked.start_time_unix_nano <= batch.start_time_unix_nano <= batch.end_time_unix_nano
    assert queue.end_time_unix_nano == batch.start_time_unix_nano
    ((_, began),), ((service, whole),) = found[begun], found["personalise"]
    assert (service, whole.trace_id.hex(), whole.parent_span_id) == ("isthmus-worker", start.trace_id, began.span_id)
    for name in steps:
        assert {span.parent_span_id for _, span in found[name]} == {whole.span_id}, name


def test_the_device_sends_the_trace_of_its_own_program() -> None:
    sent: list[Any] = []

    class Channel:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: (
                lambda request, timeout, metadata: sent.append(dict(metadata)) or pb.ForgetResponse()
            )

    channel: Any = Channel()
    link = GrpcLink(channel)
    link.forget()
    link.forget()
    first, second = (TraceContext.read(each["traceparent"]) for each in sent)
    assert first is not None and second is not None and first.trace_id != second.trace_id, "a call is a trace"
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    with trace.use_span(sdk.TracerProvider().get_tracer("test").start_span("mine")) as _:
        mine = trace.get_current_span().get_span_context()
        link.forget()
    assert TraceContext.read(sent[-1]["traceparent"]) == TraceContext(
        f"{mine.trace_id:032x}", f"{mine.span_id:016x}", True
    )


@contextmanager
def lines(formatter: logging.Formatter) -> Iterator[list[str]]:
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(self.format(record))

    handler = Handler()
    handler.setFormatter(formatter)
    logger = logging.getLogger("isthmus.cloud")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()], ids=["json", "text"])
def test_the_lines_of_a_call_name_its_trace_and_tenant(rig: Rig, formatter: logging.Formatter) -> None:
    context = TraceContext.new()

    async def scenario() -> None:
        async with rig.running() as (_, channel):
            device = await rig.enrol(channel)
            metadata = (*device.metadata, ("traceparent", context.header))
            await device.personalisation.Forget(pb.ForgetRequest(), metadata=metadata)

    with lines(formatter) as said:
        asyncio.run(scenario())
    (line,) = [line for line in said if "erased at its own wish" in line]
    if isinstance(formatter, JsonLines):
        read = json.loads(line)
        assert (read["trace"], read["tenant"]) == (context.trace_id, "default")
    else:
        assert line.endswith(f"trace={context.trace_id} tenant=default") and line.count("\n") == 0
    (listening,) = [line for line in said if "listening on port" in line]
    assert "trace" not in listening
