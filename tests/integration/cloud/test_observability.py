"""Boards and alerts of deploy/observability, on a real Prometheus that scrapes a real server under load."""

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from isthmus.cloud.generation.serve.numbers import Numbers
from isthmus.cloud.load import callers
from isthmus.cloud.metrics.elastic import ElasticCollector
from isthmus.cloud.metrics.generation import GenerationCollector
from isthmus.cloud.server import Server
from isthmus.proto.v1 import elastic_pb2 as elastic_pb
from isthmus.proto.v1 import elastic_pb2_grpc as elastic_grpc
from tests.rigs.cloud.prometheus import Prometheus, program, scraping
from tests.rigs.elastic.server import THREE, ElasticRig, pixels, png

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "observability"
BOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
RULES = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]


def expressions(board: Path) -> dict[str, str]:
    """Return the queries of a board by their panel, as Grafana would send them."""
    panels = json.loads(board.read_text())["panels"]
    found = {f"{panel['title']} {each['refId']}": each["expr"] for panel in panels for each in panel["targets"]}
    return {title: text.replace("$__rate_interval", "1m").replace("$instance", ".*") for title, text in found.items()}


async def load(server: Server, channel: Any) -> None:
    """Send every kind of call once or more: devices, a personalisation, frames, and images that are lost."""
    address = f"127.0.0.1:{server.port}"
    device = callers.Device(callers_channel(address), enrolment_key="")
    frames = callers.device_stream(callers_channel(address), "")
    for caller in (device, frames):
        await caller.open()
        for _ in range(3):
            await caller.call(60.0)
        await caller.close()
    stub = elastic_grpc.ElasticServiceStub(channel)
    image = png(pixels(0))
    asked = [stub.MakeQuery(elastic_pb.MakeQueryRequest(task="ten", encoded=image)) for _ in range(8)]
    lost = stub.MakeQuery(elastic_pb.MakeQueryRequest(task="ten", encoded=image, latency_s=1e-4))
    await asyncio.gather(*asked, lost, return_exceptions=True)


def callers_channel(address: str) -> Any:
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


def test_every_query_of_boards_and_alerts_has_a_result_on_a_service_under_load(
    tiny_release: Path, tmp_path: Path
) -> None:
    rig = ElasticRig(tmp_path)
    names = {name for board in BOARDS for text in expressions(board).values() for name in metrics(text)}
    names |= {name for rule in RULES for name in metrics(rule["expr"])}

    def asked(prometheus: Prometheus) -> None:
        prometheus.wait_for('rate(isthmus_elastic_arrivals_total{task="ten"}[1m]) > 0')
        for board in BOARDS:
            for title, text in expressions(board).items():
                if "isthmus_generate_" in text or "isthmus_tenant_" in text:
                    prometheus.query(text)
                else:  # a scrape that a busy machine misses leaves no result for a moment
                    prometheus.wait_for(text, f"{board.name}: {title}")
        for rule in RULES:
            prometheus.query(rule["expr"])
        for name in sorted(names):
            if not name.startswith(("isthmus_generate_", "isthmus_t")):
                prometheus.wait_for(f"{{__name__=~'{name}'}}")
        prometheus.wait_for('isthmus_elastic_arrivals_total{task="ten"} == 18')
        prometheus.wait_for('sum(isthmus_elastic_queries_total{task="ten"}) + sum(isthmus_elastic_pending) == 18')

    async def scenario() -> None:
        async with rig.running(THREE[0], release=tiny_release, workers=0, metrics_port=0) as (server, channel):
            await load(server, channel)
            with scraping(tmp_path / "prometheus", [f"127.0.0.1:{server.metrics_port}"]) as prometheus:
                await asyncio.to_thread(prometheus.wait_for, 'isthmus_elastic_arrivals_total{task="ten"}')
                await load(server, channel)
                await asyncio.to_thread(asked, prometheus)

    asyncio.run(scenario())


def metrics(expression: str) -> set[str]:
    """Return the names of metrics in a query."""
    return set(re.findall(r"\b(?:isthmus|grpc_server)_\w+", expression))


def test_boards_ask_for_metrics_of_generation_that_exist() -> None:
    class Idle:
        numbers = staticmethod(Numbers)

    idle: Any = Idle()
    exposed = {sample.name for family in GenerationCollector(idle).collect() for sample in family.samples}
    board = FOLDER / "grafana" / "dashboards" / "generation.json"
    assert {name for text in expressions(board).values() for name in metrics(text)} <= exposed


def test_every_alert_has_a_test_that_fires_it_and_one_that_does_not() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    cases = [each for test in tests for each in test["alert_rule_test"]]
    for rule in RULES:
        fires = {bool(each.get("exp_alerts")) for each in cases if each["alertname"] == rule["alert"]}
        assert fires == {True, False}, rule["alert"]
    done = subprocess.run(
        [program("promtool"), "test", "rules", "alerts_test.yml"], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_are_in_time_late_and_dropped_exactly(tmp_path: Path, seed: int) -> None:
    """Queries with latencies from hopeless to ample, some whose caller leaves, and a queue that overflows."""
    rng = np.random.default_rng(seed)
    rig = ElasticRig(tmp_path)

    async def scenario() -> tuple[int, dict[str, float]]:
        async with rig.running(THREE[0], elastic_max_waiting=8) as (server, channel):
            stub = elastic_grpc.ElasticServiceStub(channel)
            image = png(pixels(seed))
            requests = [
                elastic_pb.MakeQueryRequest(task="ten", encoded=image, latency_s=float(latency_s))
                for latency_s in 10 ** rng.uniform(-4, 1, 60)
            ]
            calls = [asyncio.ensure_future(stub.MakeQuery(request)) for request in requests]
            for call in rng.choice(60, 6, replace=False):
                calls[call].cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert server.elastic is not None
            samples = {
                (sample.name, sample.labels.get("outcome", "")): sample.value
                for family in ElasticCollector(server.elastic.live).collect()
                for sample in family.samples
            }
            return len(requests), {"arrivals": samples[("isthmus_elastic_arrivals_total", "")]} | {
                outcome: value for (name, outcome), value in samples.items() if name == "isthmus_elastic_queries_total"
            } | {"pending": samples[("isthmus_elastic_pending", "")]}

    sent, found = asyncio.run(scenario())
    parts = sum(found[each] for each in ("in_time", "late", "dropped", "failed", "pending"))
    # A caller that left before its query reached the engine never arrived there.
    assert found["arrivals"] == parts and sent - 6 <= found["arrivals"] <= sent
    assert found["in_time"] and found["dropped"]
