"""``make bench``: runs every command at full size, in turn, and writes JSON to runs/bench/. Asserts no speed."""

import json
import subprocess
import sys

import pytest

from tests.bench import machine


@pytest.mark.bench
@pytest.mark.parametrize(
    "name",
    [
        "selection",
        "encoder",
        "teacher_cache",
        "training",
        "stream",
        "crowds",
        "connection",
        "footprint",
        "elastic.planning",
        "elastic.drift",
        "elastic.model_sizes",
        "elastic.infaas_live",
        "elastic.front",
        "elastic.engine",
        "elastic.vit",
        "elastic.warmup",
    ],
)
def test_measure(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    out = machine.ROOT / "runs" / "bench" / f"{name}.json"
    with capfd.disabled():
        done = subprocess.run(
            [sys.executable, "-m", f"tests.bench.{name}", "--out", str(out)], cwd=machine.ROOT, check=False
        )
    assert done.returncode == 0
    assert json.loads(out.read_text())["rows"]
