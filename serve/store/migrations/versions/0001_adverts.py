"""Adverts: jobs with their inputs, images, variants, texts and overlays, and the traces of models."""

import datetime

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        *_times(),
        sa.PrimaryKeyConstraint("job_id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_tenant_id_created_at", "jobs", ["tenant_id", "created_at"])
    op.create_table(
        "image_assets",
        sa.Column("image_asset_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("path", sa.String(255), nullable=False),
        sa.Column("media_type", sa.String(64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        *_times(updated=False),
        _belongs_to("jobs", "image_assets", "job_id"),
        sa.PrimaryKeyConstraint("image_asset_id", name="pk_image_assets"),
        sa.UniqueConstraint("path", name="uq_image_assets_path"),
    )
    op.create_index("ix_image_assets_job_id", "image_assets", ["job_id"])
    op.create_table(
        "job_inputs",
        sa.Column("job_input_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("img_asset_id", sa.Uuid(), nullable=False),
        sa.Column("desc_eng", sa.Text()),
        *_times(updated=False),
        _belongs_to("jobs", "job_inputs", "job_id"),
        _image("job_inputs", "img_asset_id"),
        sa.PrimaryKeyConstraint("job_input_id", name="pk_job_inputs"),
    )
    op.create_index("ix_job_inputs_job_id", "job_inputs", ["job_id"])
    op.create_index("ix_job_inputs_img_asset_id", "job_inputs", ["img_asset_id"])
    op.create_table(
        "jobs_variants",
        sa.Column("job_variants_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("img_asset_id", sa.Uuid(), nullable=False),
        sa.Column("overlaid_img_asset_id", sa.Uuid()),
        sa.Column("step", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("progress", sa.JSON()),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("lease_id", sa.Uuid()),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        *_times(),
        _belongs_to("jobs", "jobs_variants", "job_id"),
        _image("jobs_variants", "img_asset_id"),
        _image("jobs_variants", "overlaid_img_asset_id"),
        sa.PrimaryKeyConstraint("job_variants_id", name="pk_jobs_variants"),
    )
    op.create_index("ix_jobs_variants_job_id", "jobs_variants", ["job_id"])
    op.create_index("ix_jobs_variants_img_asset_id", "jobs_variants", ["img_asset_id"])
    op.create_index("ix_jobs_variants_overlaid_img_asset_id", "jobs_variants", ["overlaid_img_asset_id"])
    op.create_index("ix_jobs_variants_status_lease_until", "jobs_variants", ["status", "lease_until"])
    op.create_table(
        "txt_ad_copy_generations",
        sa.Column("ad_copy_gen_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("generation_stage", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("ad_copy_eng", sa.Text()),
        *_times(),
        _belongs_to("jobs", "txt_ad_copy_generations", "job_id"),
        sa.PrimaryKeyConstraint("ad_copy_gen_id", name="pk_txt_ad_copy_generations"),
    )
    op.create_index(
        "ix_txt_ad_copy_generations_newest",
        "txt_ad_copy_generations",
        ["job_id", "generation_stage", "status", "created_at"],
    )
    op.create_table(
        "overlay_layouts",
        sa.Column("overlay_id", sa.Uuid(), nullable=False),
        sa.Column("job_variants_id", sa.Uuid(), nullable=False),
        sa.Column("layout", sa.JSON(), nullable=False),
        *_times(updated=False),
        _belongs_to("jobs_variants", "overlay_layouts", "job_variants_id"),
        sa.PrimaryKeyConstraint("overlay_id", name="pk_overlay_layouts"),
    )
    op.create_index(
        "ix_overlay_layouts_job_variants_id_created_at", "overlay_layouts", ["job_variants_id", "created_at"]
    )
    op.create_table(
        "vlm_traces",
        sa.Column("vlm_trace_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("job_variants_id", sa.Uuid(), nullable=False),
        sa.Column("provider", sa.String(32), nullable=False),
        sa.Column("operation_type", sa.String(16), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("response", sa.JSON()),
        sa.Column("latency_ms", sa.Integer()),
        *_times(),
        _belongs_to("jobs", "vlm_traces", "job_id"),
        _belongs_to("jobs_variants", "vlm_traces", "job_variants_id"),
        sa.PrimaryKeyConstraint("vlm_trace_id", name="pk_vlm_traces"),
    )
    op.create_index(
        "ix_vlm_traces_job_id_created_at_vlm_trace_id", "vlm_traces", ["job_id", "created_at", "vlm_trace_id"]
    )
    op.create_index("ix_vlm_traces_job_variants_id", "vlm_traces", ["job_variants_id"])


def _times(updated: bool = True) -> list[sa.Column[datetime.datetime]]:
    names = ("created_at", "updated_at") if updated else ("created_at",)
    return [sa.Column(name, sa.DateTime(timezone=True), nullable=False) for name in names]


def _belongs_to(owner: str, table: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        [column], [f"{owner}.{column}"], name=f"fk_{table}_{column}_{owner}", ondelete="CASCADE"
    )


def _image(table: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], ["image_assets.image_asset_id"], name=f"fk_{table}_{column}_image_assets")
