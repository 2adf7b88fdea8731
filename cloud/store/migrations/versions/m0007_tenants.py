"""Tenants with their keys, quotas and usage; the audit log; the trace that a job belongs to."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("closed_s", sa.Float, nullable=True),
        sa.Column("most_devices", sa.BigInteger, nullable=True),
        sa.Column("most_tasks", sa.BigInteger, nullable=True),
        sa.Column("jobs_per_day", sa.BigInteger, nullable=True),
        sa.Column("queries_per_s", sa.Float, nullable=True),
        sa.Column("bytes_per_day", sa.BigInteger, nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "tenant_keys",
        sa.Column("key_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("key_hash", name="pk_tenant_keys"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_tenant_keys_tenant"),
    )
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("day", sa.Integer, nullable=False),
        sa.Column("jobs", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("tenant", "day", name="pk_usage"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False, autoincrement=True),
        sa.Column("at_s", sa.Float, nullable=False),
        sa.Column("tenant", sa.String(32), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.String(128), nullable=False),
        sa.Column("detail", sa.String(300), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    # Each column has a default, so that a server of the version before goes on writing.
    op.add_column("devices", sa.Column("tenant", sa.String(32), nullable=False, server_default="default"))
    op.add_column("devices", sa.Column("certificate", sa.String(255), nullable=True))
    op.add_column("jobs", sa.Column("trace", sa.String(64), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("jobs", "trace")
    op.drop_column("devices", "certificate")
    op.drop_column("devices", "tenant")
    for table in ("audit", "usage", "tenant_keys", "tenants"):
        op.drop_table(table)
