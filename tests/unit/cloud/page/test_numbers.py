"""The serving side's page reads the service's metrics, and says so plainly if there are none."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("starlette", reason="the page needs isthmus[generate]")

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.testclient import TestClient

from isthmus.cloud.page.app import cloud_page
from isthmus.cloud.page.numbers import read_numbers
from isthmus.proto.errors import InvalidInput, Unavailable


@contextmanager
def showing(content: bytes, status: int = 200) -> Iterator[int]:
    """Answer every request on a free port with this content."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *words: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def metrics() -> bytes:
    registry = CollectorRegistry()
    Counter("isthmus_elastic_arrivals", "", ["task"], registry=registry).labels("cats").inc(7)
    Gauge("isthmus_elastic_pace", "", registry=registry).set(1.5)
    Gauge("python_info", "", registry=registry).set(1)
    return generate_latest(registry)


def test_only_the_services_own_metrics_are_shown() -> None:
    with showing(metrics()) as port:
        found = read_numbers(port)
        assert found["isthmus_elastic_arrivals_total"] == [{"labels": {"task": "cats"}, "value": 7.0}]
        assert found["isthmus_elastic_pace"] == [{"labels": {}, "value": 1.5}]
        assert "python_info" not in found
        page = TestClient(cloud_page(port))
        assert page.get("/api/numbers").json() == found
        assert page.get("/api/page").json()["page"] == "cloud"


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"<html>", 200), (b"", 200), (b"\xff\xfe", 200), (metrics(), 500), (b"a b c d {", 200)],
    ids=["a page", "nothing", "no text", "an error", "no metrics"],  # metrics hold the time, so they name no test
)
def test_what_is_no_service_is_named(content: bytes, status: int) -> None:
    with showing(content, status) as port, pytest.raises(InvalidInput, match=f"port {port} shows no metrics"):
        read_numbers(port)


def test_a_service_that_does_not_run_is_named_with_the_way_out() -> None:
    with showing(b"") as port:
        pass
    with pytest.raises(Unavailable, match=f"start it with --metrics-port {port}"):
        read_numbers(port)
    assert TestClient(cloud_page(port)).get("/api/numbers").status_code == 503
