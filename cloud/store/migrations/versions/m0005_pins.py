"""What must not change unnoticed: the database's own id, the signing key, the heads of students."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pins",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_pins"),
    )
    op.add_column("students", sa.Column("heads_sha256", sa.LargeBinary(32), nullable=True))
    op.add_column("devices", sa.Column("seen_s", sa.Float, nullable=True))


def downgrade() -> None:
    op.drop_column("devices", "seen_s")
    op.drop_column("students", "heads_sha256")
    op.drop_table("pins")
