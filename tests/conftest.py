"""What every test starts from: one compute thread, repeatable property tests, the real data where there is any."""

import os

# Before numpy or torch is imported: several threads on a busy machine of two cores are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def emopair() -> Path:
    """The folder of EmoPair, real speech and faces in CREMA-D's layout; the test is skipped where there is none."""
    value = os.environ.get("ISTHMUS_EMOPAIR")
    if not value:
        pytest.skip("set ISTHMUS_EMOPAIR to the emopair folder to run this test on real clips")
    folder = Path(value)
    if not (folder / "manifest.csv").is_file():
        pytest.fail(f"ISTHMUS_EMOPAIR is {value}, where no manifest.csv is")
    return folder
