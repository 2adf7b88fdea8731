"""The last release and this version serve one PostgreSQL database together, as during a rolling update."""

import asyncio
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from isthmus.cloud.personalise import job_rows
from isthmus.cloud.store import devices
from isthmus.cloud.store.database import Database
from tests.rigs.cloud.postgres import Cluster, running_cluster
from tests.rigs.cloud.service import Client, Rig, make_tiny_release
from tests.rigs.distill.release import wide_recipe

RELEASES = sorted((Path(__file__).parents[2] / "golden" / "releases").glob("*.whl"))
WAIT_S = 600.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@contextmanager
def former(wheel: Path, folder: Path, *options: object) -> Iterator[str]:
    """Run the server of an earlier release, with the libraries that are here. Yield its address."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    port, log = folder / "port", folder / "log"
    # Neither the checkout in the working folder nor an editable installation comes before the wheel.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "isthmus.cli", "cloud", "serve", "--port-file", port, *options]
    with log.open("wb") as out:
        process = subprocess.Popen(list(map(str, words)), env=environment, cwd=folder, stdout=out, stderr=out)
    try:
        until_s = time.monotonic() + WAIT_S
        while not port.exists() or not port.read_text().strip():
            assert process.poll() is None and time.monotonic() < until_s, log.read_text()[-2_000:]
            time.sleep(0.05)
        yield f"127.0.0.1:{port.read_text().strip().rpartition(':')[2]}"
        assert process.poll() is None, log.read_text()[-2_000:]
    finally:
        process.terminate()
        process.wait(WAIT_S)


@pytest.mark.parametrize("wheel", RELEASES, ids=lambda wheel: wheel.name.split("-")[1])
def test_the_last_release_and_this_version_serve_one_database(wheel: Path, cluster: Cluster, tmp_path: Path) -> None:
    """The former server made the database, and goes on while this version upgrades it and serves beside it."""
    state = tmp_path / "former"
    state.mkdir()
    make_tiny_release(tmp_path / "release", wide_recipe())
    rig = Rig(tmp_path / "release", tmp_path / "state")

    async def known(client: Client, channel: grpc.aio.Channel) -> bool:
        """Whether a server knows a device that enrolled at another one."""
        return bool((await Client(client.device_id, channel, client.metadata).describe()).student_id)

    async def scenario(database: Database) -> None:
        url = database.url.render_as_string(hide_password=False)
        options = ("--release", rig.release, "--state", state, "--database", url)
        with former(wheel, tmp_path, *options) as address:
            async with grpc.aio.insecure_channel(address) as old:
                first = await rig.enrol(old, "of the former")
                shared = {"signing_key_file": state / "signing_key", "artefacts": str(state / "artefacts")}
                async with rig.running(database=url, **shared) as (_, new):
                    assert await known(first, new), "enrolled before the upgrade"
                    second, third = await rig.enrol(new, "of this version"), await rig.enrol(old, "of both")
                    for client in (first, second, third):
                        assert await known(client, old) and await known(client, new)
                    job = await rig.start(Client(third.device_id, old, third.metadata))
                    other = await rig.start(Client(second.device_id, new, second.metadata))
                    rows = [job_rows.get(database, each.job_id) for each in (job, other)]
                    assert [row.device_id for row in rows] == [third.device_id, second.device_id]
                    assert {each.tenant for each in devices.listing(database)} == {"default"}
                assert await known(second, old), "and after this version has gone"

    with cluster.database() as database:
        asyncio.run(scenario(database))
