"""The stores of a cloud: {SQLite, PostgreSQL} x {a folder, S3 over HTTP}. A test that takes ``bench`` runs on each."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.rigs.cloud.jobs import Bench
from tests.rigs.cloud.postgres import Cluster, running_cluster
from tests.rigs.cloud.s3 import running_s3

STORES = [(database, files) for database in ("sqlite", "postgresql") for files in ("folder", "s3")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with running_s3() as url:
        yield url


@pytest.fixture(params=STORES, ids=["+".join(pair) for pair in STORES])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """A cloud of these stores. S3 is used below a prefix of the test's own."""
    kind, files = request.param
    prefix = f"{request.getfixturevalue('s3')}/{uuid4().hex}" if files == "s3" else None
    if kind == "sqlite":
        yield Bench(tmp_path, None, prefix)
        return
    with request.getfixturevalue("cluster").database() as database:
        made = Bench(tmp_path, database.url.render_as_string(hide_password=False), prefix)
        yield made
        made.database.close()
