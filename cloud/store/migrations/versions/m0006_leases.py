"""Leases of jobs, so that any number of workers share one database; where a job's working files are."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Each column has a default, so that a server of the version before goes on writing.
    op.add_column("jobs", sa.Column("worker", sa.String(32), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("fence", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("lease_until_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("work_files", sa.JSON, nullable=False, server_default="{}"))


def downgrade() -> None:
    for name in ("work_files", "lease_until_s", "fence", "worker"):
        op.drop_column("jobs", name)
