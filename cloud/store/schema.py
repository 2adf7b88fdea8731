"""The tables. Migrations produce this schema; a test compares the two."""

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    # SHA-256 of the token. The token itself is never stored.
    sa.Column("token_hash", sa.LargeBinary(32), nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("revoked_s", sa.Float, nullable=True),
    # NULL: the device has not called since it enrolled.
    sa.Column("seen_s", sa.Float, nullable=True),
    sa.Column("tenant", sa.String(32), nullable=False, server_default="default"),
    # Identity in the TLS certificate with which it enrolled. Its later calls need that certificate too.
    sa.Column("certificate", sa.String(255), nullable=True),
    # The release of the student that it fetched or asked with last; "" if that is unknown.
    sa.Column("release", sa.String(64), nullable=False, server_default=""),
)

# Who shares the service. "default" needs no row: it is the tenant of all that was there before there were others.
# NULL: no limit.
tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("closed_s", sa.Float, nullable=True),
    sa.Column("most_devices", sa.BigInteger, nullable=True),
    sa.Column("most_tasks", sa.BigInteger, nullable=True),
    sa.Column("jobs_per_day", sa.BigInteger, nullable=True),
    sa.Column("queries_per_s", sa.Float, nullable=True),
    sa.Column("bytes_per_day", sa.BigInteger, nullable=True),
)

# SHA-256 of each key. Keys have 256 random bits, so a plain hash is enough.
tenant_keys = sa.Table(
    "tenant_keys",
    metadata,
    sa.Column("key_hash", sa.LargeBinary(32), primary_key=True),
    sa.Column("tenant", sa.String(32), sa.ForeignKey("tenants.name"), nullable=False),
    sa.Column("purpose", sa.String(16), nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
)

# What a tenant has used on a day, counted in days since 1970 (UTC).
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("tenant", sa.String(32), primary_key=True),
    sa.Column("day", sa.Integer, primary_key=True),
    sa.Column("jobs", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
)

# What was enrolled, published, removed and refused. See audit.py.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("tenant", sa.String(32), nullable=False),
    sa.Column("actor", sa.String(64), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("subject", sa.String(128), nullable=False),
    sa.Column("detail", sa.String(300), nullable=False),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("device_id", sa.String(32), sa.ForeignKey("devices.id"), nullable=False),
    sa.Column("idempotency_key", sa.String(64), nullable=False),
    sa.Column("release_hash", sa.String(128), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("stage", sa.String(32), nullable=False, index=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("rounds", sa.Integer, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("epochs", sa.Integer, nullable=False),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("stalls", sa.Integer, nullable=False, server_default="0"),
    sa.Column("not_before_s", sa.Float, nullable=False),
    sa.Column("selected_per_class", sa.JSON, nullable=False),
    sa.Column("stage_seconds", sa.JSON, nullable=False),
    sa.Column("student_id", sa.String(64), nullable=False),
    sa.Column("error", sa.String(300), nullable=False),
    sa.Column("settled", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("updated_s", sa.Float, nullable=False),
    # The worker that holds the job ("": none), until when, and how often the job was taken. See leases.py.
    sa.Column("worker", sa.String(32), nullable=False, server_default=""),
    sa.Column("fence", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_until_s", sa.Float, nullable=False, server_default="0"),
    # SHA-256 (in hexadecimal) by name of the working files whose copies are in the artefacts. See work_files.py.
    sa.Column("work_files", sa.JSON, nullable=False, server_default="{}"),
    # The W3C trace context of the call that started the job; "" if there is none.
    sa.Column("trace", sa.String(64), nullable=False, server_default=""),
    sa.UniqueConstraint("device_id", "idempotency_key"),
)

# The prototypes of each round, as the bytes of the received protobuf message.
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("payload", sa.LargeBinary, nullable=False),
)

students = sa.Table(
    "students",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    # NULL for a base student, which every device may fetch.
    sa.Column("device_id", sa.String(32), sa.ForeignKey("devices.id"), nullable=True, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    # Exactly the signed bytes.
    sa.Column("manifest", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary, nullable=False),
    # NULL: an interim student, which has no heads, or one that was published before this was recorded.
    sa.Column("heads_sha256", sa.LargeBinary(32), nullable=True),
    sa.Column("created_s", sa.Float, nullable=False),
    # The release that it is of; "" if a version before 0.2 made it and that cannot be found.
    sa.Column("release", sa.String(64), nullable=False, server_default=""),
)

# The releases that devices may be offered. A row appears when everything else of its release is in its place.
releases = sa.Table(
    "releases",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    # What a server needs of it, as JSON, see offers/offer.py.
    sa.Column("offer", sa.Text, nullable=False),
    # SHA-256 and size of each of its files, see store/releases.py.
    sa.Column("files", sa.LargeBinary, nullable=False),
    # Whether the artefacts hold its files, so that every worker can work on its jobs.
    sa.Column("stored", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("created_s", sa.Float, nullable=False),
)

# To which devices a release is offered, see offers/rollout.py. Not in "releases", so that a record can be changed
# without the files' hashes being written again.
rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("release", sa.String(64), sa.ForeignKey("releases.id"), primary_key=True),
    sa.Column("share", sa.Float, nullable=False),
    sa.Column("devices", sa.JSON, nullable=False),
    sa.Column("serial", sa.BigInteger, nullable=False),
    sa.Column("withdrawn_s", sa.Float, nullable=True),
)

# Used by version 0.1 alone, which may still serve the database while it is replaced. Dropped in a later version.
fences = sa.Table(
    "fences",
    metadata,
    sa.Column("purpose", sa.String(16), primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False),
)

# Facts that must not change unnoticed, see continuity.py.
pins = sa.Table(
    "pins",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)

tasks = sa.Table(
    "tasks",
    metadata,
    # A task of another tenant than "default" is named TENANT/NAME.
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("artefact_id", sa.String(64), nullable=False, index=True),
    sa.Column("created_s", sa.Float, nullable=False),
)
