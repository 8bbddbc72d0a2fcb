"""Jobs, events and images. Databases from before there were migrations have these tables already."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("run", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("ended", sa.Boolean, nullable=False),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("retry_after", sa.Double),
        sa.Column("image_url", sa.Text),
        sa.Column("image_key", sa.Text),
        sa.Column("request_metadata", sa.JSON, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "events",
        sa.Column("event_id", sa.Text, primary_key=True),
        sa.Column("job_id", sa.Text),
        sa.Column("run", sa.BigInteger),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_events_job_id", "events", ["job_id"], if_not_exists=True)
    _create_images()


def _create_images() -> None:
    op.create_table(
        "images",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("run", sa.BigInteger, primary_key=True),
        sa.Column("url", sa.Text),
        sa.Column("key", sa.Text),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("width", sa.BigInteger, nullable=False),
        sa.Column("height", sa.BigInteger, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("steps", sa.BigInteger, nullable=False),
        sa.Column("cfg", sa.Double, nullable=False),
        sa.Column("timings", sa.JSON, nullable=False),
        sa.Column("model_info", sa.JSON, nullable=False),
        sa.Column("gpu", sa.Text, nullable=False),
        sa.Column("gpu_seconds", sa.Double, nullable=False),
        if_not_exists=True,
    )
