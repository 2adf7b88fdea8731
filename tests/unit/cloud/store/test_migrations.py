"""Migrations on a database that two versions use at once: no lock that a server would notice, no row that breaks it."""

import importlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from isthmus.cloud.store import devices, tenants
from isthmus.cloud.store.database import Database
from tests.rigs.project.system import missing

VERSIONS = Path(tenants.__file__).parent / "migrations" / "versions"
CHECKED = ("m0007_tenants", "m0008_releases")
STYLE = "prefer-text-field,prefer-bigint-over-int,prefer-identity"


@pytest.mark.parametrize("name", CHECKED)
def test_a_migration_takes_no_long_lock_on_postgresql(name: str, tmp_path: Path) -> None:
    """squawk reads the SQL. What it says of style is left out: names of types were chosen before."""
    squawk = shutil.which("squawk", path=str(Path(sys.executable).parent)) or shutil.which("squawk")
    if squawk is None:
        missing("squawk is not installed: make install")
    sql = io.StringIO("")
    sql.write("SET lock_timeout = '10s';\nSET statement_timeout = '60s';\n")
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True, "output_buffer": sql})
    module = importlib.import_module(f"isthmus.cloud.store.migrations.versions.{name}")
    with Operations.context(context):
        module.upgrade()
    path = tmp_path / "migration.sql"
    path.write_text(sql.getvalue())
    options = ["--pg-version", "14", "--assume-in-transaction", "--exclude", STYLE]
    done = subprocess.run([squawk, *options, str(path)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_new_migration_is_checked() -> None:
    new = {path.stem for path in VERSIONS.glob("m*.py") if path.stem >= "m0007"}
    assert new == set(CHECKED)


def test_rows_of_the_version_before_belong_to_the_default_tenant(tmp_path: Path) -> None:
    """The version before goes on writing after the upgrade: it names the columns that it knows."""
    database = Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
    database.migrate()
    with database.writing() as connection:
        connection.execute(
            sa.text("INSERT INTO devices (id, name, token_hash, created_s) VALUES ('old', 'kiosk', :hash, 1.0)"),
            {"hash": bytes(32)},
        )
    device = devices.get(database, "old")
    assert device is not None and (device.tenant, device.certificate) == (tenants.DEFAULT, None)
    assert [each.device_id for each in devices.listing(database, tenants.DEFAULT)] == ["old"]
