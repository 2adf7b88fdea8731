"""A PostgreSQL cluster for the tests, on a free port of loopback, and databases in it."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from isthmus.cloud.store.database import Database
from tests.rigs.project.ports import free_port
from tests.rigs.project.system import missing

_USER = "postgres"


@dataclass
class Cluster:
    """A cluster. ``url`` is the administrator's database. ``stop`` and ``start`` make it vanish and return."""

    programs: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start the cluster and wait until it answers."""
        options = ["-p", str(self.port), "-k", str(self.folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        command = [*_as_user(), str(self.programs / "postgres"), "-D", str(self.folder / "data"), *options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log)
        until_s = time.monotonic() + 300
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until_s:
                pytest.fail(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-500:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the cluster at once, with all connections."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(120)
            self.process = None

    def sql(self, statement: str, database: str = "postgres") -> list[Any]:
        """Run a statement as administrator; return its rows."""
        url = sa.make_url(self.url).set(drivername="postgresql+psycopg", database=database)
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return list(result) if result.returns_rows else []

    @contextmanager
    def database(self) -> Iterator[Database]:
        """Make a new, empty database; drop it afterwards."""
        name = f"isthmus_test_{secrets.token_hex(4)}"
        self.sql(f"CREATE DATABASE {name}")
        url = sa.make_url(self.url).set(database=name)
        opened = Database(url.render_as_string(hide_password=False))
        try:
            yield opened
        finally:
            opened.close()
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    def _answers(self) -> bool:
        try:
            return bool(self.sql("SELECT 1"))
        except sa.exc.OperationalError:
            return False


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Make a new cluster; remove it afterwards. Without PostgreSQL's programs: see ``system.missing``."""
    try:
        import psycopg  # noqa: F401
    except ModuleNotFoundError:
        missing("the Python package psycopg is not installed: pip install 'psycopg[binary]'")
    found = shutil.which("initdb") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
    if found is None:
        missing("PostgreSQL is not installed: make system")
    folder = Path(tempfile.mkdtemp(prefix="isthmus-postgres-"))
    folder.chmod(0o711)
    if os.geteuid() == 0:
        shutil.chown(folder, _USER)
    cluster = Cluster(Path(str(found)).resolve().parent, folder, free_port())
    try:
        create = [*_as_user(), str(cluster.programs / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", _USER]
        subprocess.run([*create, "--no-sync"], cwd="/", check=True, capture_output=True)
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _as_user() -> list[str]:
    # PostgreSQL refuses to run as root.
    return [] if os.geteuid() else ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
