"""Releases, and which devices are offered which; the release of each student and of each device's student."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "releases",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("offer", sa.Text, nullable=False),
        sa.Column("files", sa.LargeBinary, nullable=False),
        sa.Column("stored", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("created_s", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_releases"),
    )
    op.create_table(
        "rollouts",
        sa.Column("release", sa.String(64), nullable=False),
        sa.Column("share", sa.Float, nullable=False),
        sa.Column("devices", sa.JSON, nullable=False),
        sa.Column("serial", sa.BigInteger, nullable=False),
        sa.Column("withdrawn_s", sa.Float, nullable=True),
        sa.PrimaryKeyConstraint("release", name="pk_rollouts"),
        sa.ForeignKeyConstraint(["release"], ["releases.id"], name="fk_rollouts_release"),
    )
    # Each column has a default, so that a server of the version before goes on writing.
    op.add_column("devices", sa.Column("release", sa.String(64), nullable=False, server_default=""))
    op.add_column("students", sa.Column("release", sa.String(64), nullable=False, server_default=""))
    # A finished student has its job's id, and a base student that of its release, which was always 16 digits long.
    of_job = "(SELECT jobs.release_hash FROM jobs WHERE jobs.id = students.id)"
    op.execute(f"UPDATE students SET release = {of_job} WHERE id IN (SELECT id FROM jobs)")
    op.execute("UPDATE students SET release = substr(id, 6) WHERE device_id IS NULL AND id LIKE 'base-%'")


def downgrade() -> None:
    op.drop_column("students", "release")
    op.drop_column("devices", "release")
    op.drop_table("rollouts")
    op.drop_table("releases")
