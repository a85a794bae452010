"""Image files that are not recorded yet."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "pending_files",
        sa.Column("path", sa.String(255), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("path", name="pk_pending_files"),
    )
    op.create_index("ix_pending_files_tenant_id_path", "pending_files", ["tenant_id", "path"])
    op.create_index("ix_pending_files_state_created_at", "pending_files", ["state", "created_at"])
