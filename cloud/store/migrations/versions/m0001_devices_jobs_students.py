"""The first tables: devices, jobs with their uploads, students."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("revoked_s", sa.Float, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_devices"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("device_id", sa.String(32), nullable=False),
        sa.Column("idempotency_key", sa.String(64), nullable=False),
        sa.Column("release_hash", sa.String(128), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("stage", sa.String(32), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("rounds", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("epochs", sa.Integer, nullable=False),
        sa.Column("progress", sa.Float, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("not_before_s", sa.Float, nullable=False),
        sa.Column("selected_per_class", sa.JSON, nullable=False),
        sa.Column("stage_seconds", sa.JSON, nullable=False),
        sa.Column("student_id", sa.String(64), nullable=False),
        sa.Column("error", sa.String(300), nullable=False),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.Column("updated_s", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_jobs_device_id"),
        sa.UniqueConstraint("device_id", "idempotency_key", name="uq_jobs_device_id_idempotency_key"),
    )
    op.create_index("ix_jobs_stage", "jobs", ["stage"])
    op.create_table(
        "uploads",
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "round", name="pk_uploads"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_uploads_job_id"),
    )
    op.create_table(
        "students",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("device_id", sa.String(32), nullable=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_students"),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_students_device_id"),
    )
    op.create_index("ix_students_device_id", "students", ["device_id"])


def downgrade() -> None:
    for table in ("students", "uploads", "jobs", "devices"):
        op.drop_table(table)
