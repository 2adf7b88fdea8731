"""A real Prometheus on a free port of loopback that scrapes given targets every quarter of a second."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.rigs.project.ports import free_port
from tests.rigs.project.system import missing

_START_S = 300.0


def program(name: str) -> str:
    """Return the path of ``prometheus`` or ``promtool``; without it the test is skipped (see ``missing``)."""
    found = shutil.which(name)
    if found is None:
        missing("Prometheus is not installed: make system")
    return found


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of a query at this moment. Fails the test if Prometheus refuses it."""
        with urlopen(f"{self.url}/api/v1/query?{urlencode({'query': expression})}", timeout=_START_S) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", (expression, answer)
        return list(answer["data"]["result"])

    def wait_for(self, expression: str, what: str = "") -> list[dict[str, Any]]:
        """Ask until there is a result, and return it. Fails the test if there is none, naming ``what``."""
        until_s = time.monotonic() + _START_S
        while not (found := self.query(expression)):
            if time.monotonic() > until_s:
                pytest.fail(f"Prometheus has no result of {expression} ({what})")
            time.sleep(0.1)
        return found


@contextmanager
def scraping(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """Run Prometheus on ``targets`` (HOST:PORT) under the job name of deploy/observability/prometheus.yml."""
    folder.mkdir()
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"},
                "scrape_configs": [{"job_name": "isthmus", "static_configs": [{"targets": targets}]}],
            }
        )
    )
    address = f"127.0.0.1:{free_port()}"
    command = [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=log)
    try:
        until_s = time.monotonic() + _START_S
        while not _ready(address):
            if process.poll() is not None or time.monotonic() > until_s:
                pytest.fail(f"Prometheus did not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.1)
        yield Prometheus(f"http://{address}")
    finally:
        process.kill()
        process.wait()


def _ready(address: str) -> bool:
    try:
        with urlopen(f"http://{address}/-/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
