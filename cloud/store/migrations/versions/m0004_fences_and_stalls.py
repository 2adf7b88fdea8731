"""Fences against a server that has lost its lock; how often a job has waited for a full disk."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "fences",
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("purpose", name="pk_fences"),
    )
    op.add_column("jobs", sa.Column("stalls", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("jobs", "stalls")
    op.drop_table("fences")
