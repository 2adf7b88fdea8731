"""Each file of examples/ runs as a newcomer would run it, and prints what its text promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rigs.elastic.server import THREE, ElasticRig, pixels, png
from tests.rigs.project.protobuf import TOO_NEW_FOR_TRITON, WHY

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

TESTED = {
    "add_policy",
    "add_strategy",
    "ask_with_triton",
    "personalise_from_python",
    "read_report",
    "serve_timm_images",
}


def run(name: str, *args: object, code: int = 0) -> str:
    """Standard output of an example that ends with ``code``; standard error if it is not 0."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_every_example_is_tested_and_imports_public_names_only() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(files) == TESTED
    for name, text in files.items():
        assert "from isthmus." not in text and "import isthmus." not in text, name


@pytest.mark.e2e
def test_a_policy_is_added() -> None:
    printed = run("add_policy")
    shares = {line.split()[0]: float(line.split(",")[1].split("%")[0]) for line in printed.splitlines()[1:]}
    assert set(shares) == {"earliest_deadline", "pets", "otas", "priced"}
    assert 0 < shares["earliest_deadline"] < shares["priced"] <= 100


@pytest.mark.e2e
def test_a_strategy_is_added() -> None:
    lines = run("add_strategy").splitlines()
    counts = {line.split()[0]: line for line in lines[1:]}
    assert set(counts) == {"class_shares", "cosine", "random"}
    assert all(int(line.split()[2]) > 20 for line in counts.values())


@pytest.mark.e2e
def test_a_student_is_personalised() -> None:
    printed = run("personalise_from_python", "--preset", "tiny", "--epochs", 1, "--takes", 1)
    assert "the device would send" in printed and "public clips selected" in printed
    assert "accuracy on the user's clips: base" in printed


@pytest.mark.e2e
def test_images_are_served() -> None:
    printed = run("serve_timm_images")
    assert "task 'own' has 3 classes" in printed
    assert printed.count("picture ") == 3 and "gamma" in printed


@pytest.mark.e2e
@pytest.mark.skipif(TOO_NEW_FOR_TRITON, reason=WHY)
def test_tritons_client_asks(tmp_path: Path) -> None:
    rig = ElasticRig(tmp_path)
    pictures = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(pictures):
        path.write_bytes(png(pixels(seed)))
    with rig.serving(*THREE) as address:
        printed = run("ask_with_triton", address, "ten", *pictures)
        refused = run("ask_with_triton", address, "nobody", *pictures, code=1)
    assert [line.split(":")[0] for line in printed.splitlines()] == ["0.png", "1.png"]
    assert "(gamma" in printed
    assert "no task 'nobody'" in refused and "five, pair, ten" in refused


@pytest.mark.e2e
def test_a_report_is_read(tmp_path: Path) -> None:
    report = ROOT / "tests" / "golden" / "report.json"
    printed = run("read_report", report)
    assert printed.startswith("device ") and "bytes of recordings" in printed
    (tmp_path / "other.json").write_text("[]")
    assert "is not a device's report" in run("read_report", tmp_path / "other.json", code=1)
