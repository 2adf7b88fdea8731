"""One Ray cluster for all contract tests of a process."""

from collections.abc import Iterator

import pytest

from isthmus.cloud.cluster import connection as cluster


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster of two CPUs on loopback, to which this process is connected."""
    cluster.connect(cluster.LOCAL, cpus=2)
    yield
    cluster.leave()
