"""The tables of the record: adverts, what was asked and answered about them, and the events these lead to.

Times are UTC. A job belongs to a tenant. Everything else belongs to a job and is deleted with it. Only pending files
may belong to a job that does not exist yet.
"""

from __future__ import annotations

import datetime
import uuid
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, Index, MetaData, String, Text, TypeDecorator, Uuid
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class UtcTime(TypeDecorator[datetime.datetime]):
    """A time in UTC, even if the database knows no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, dialect: Dialect) -> datetime.datetime | None:
        return value and value.astimezone(datetime.UTC)

    def process_result_value(self, value: datetime.datetime | None, dialect: Dialect) -> datetime.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012
        uuid.UUID: Uuid,
        datetime.datetime: UtcTime,
        dict[str, Any]: JSON(none_as_null=True),
    }


def _of_job() -> Mapped[uuid.UUID]:
    return mapped_column(ForeignKey("jobs.job_id", ondelete="CASCADE"), index=True)


class Job(Table):
    __tablename__ = "jobs"
    __table_args__ = (Index(None, "tenant_id", "created_at"),)

    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime.datetime] = mapped_column(default=now, onupdate=now)


class JobInput(Table):
    """What a job was created with."""

    __tablename__ = "job_inputs"

    job_input_id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    job_id: Mapped[uuid.UUID] = _of_job()
    img_asset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("image_assets.image_asset_id"), index=True)
    desc_eng: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)


class ImageAsset(Table):
    """An image file, at `path` below the assets folder."""

    __tablename__ = "image_assets"

    image_asset_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    job_id: Mapped[uuid.UUID] = _of_job()
    path: Mapped[str] = mapped_column(String(255), unique=True)
    media_type: Mapped[str] = mapped_column(String(64))
    width: Mapped[int]
    height: Mapped[int]
    size_bytes: Mapped[int]
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)


class PendingFile(Table):
    """An image file that is being or has been written and has no ImageAsset. Its job may not exist either."""

    __tablename__ = "pending_files"
    __table_args__ = (Index(None, "tenant_id", "path"), Index(None, "state", "created_at"))

    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[uuid.UUID]
    state: Mapped[str] = mapped_column(String(16))
    """`writing`, or `dropped` if it can't be recorded any more."""
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)


class Variant(Table):
    """One version of a job's advert, and how far it is: `step` and `status`.

    Each change of these raises `revision`, and is made only if the revision is still the one that was read. While the
    status is `running`, `lease_id` says which call holds the lease, and `lease_until` for how long.
    """

    __tablename__ = "jobs_variants"
    __table_args__ = (Index(None, "status", "lease_until"),)

    job_variants_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    job_id: Mapped[uuid.UUID] = _of_job()
    img_asset_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("image_assets.image_asset_id"), index=True)
    overlaid_img_asset_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("image_assets.image_asset_id"), index=True
    )
    step: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    """Why it failed."""
    progress: Mapped[dict[str, Any] | None]
    """Progress of a running stage: its place while queued, or the tokens so far while running."""
    revision: Mapped[int] = mapped_column(default=0)
    lease_id: Mapped[uuid.UUID | None]
    lease_until: Mapped[datetime.datetime | None]
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime.datetime] = mapped_column(default=now, onupdate=now)


class AdCopy(Table):
    """A text that was written for a job; `generation_stage` says which kind."""

    __tablename__ = "txt_ad_copy_generations"
    __table_args__ = (Index("ix_txt_ad_copy_generations_newest", "job_id", "generation_stage", "status", "created_at"),)

    ad_copy_gen_id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.job_id", ondelete="CASCADE"))
    generation_stage: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    ad_copy_eng: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime.datetime] = mapped_column(default=now, onupdate=now)


class Overlay(Table):
    """What was laid over a variant's image, as the client describes it."""

    __tablename__ = "overlay_layouts"
    __table_args__ = (Index(None, "job_variants_id", "created_at"),)

    overlay_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    job_variants_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs_variants.job_variants_id", ondelete="CASCADE"))
    layout: Mapped[dict[str, Any]]
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)


class Trace(Table):
    """What one call asked a model, and the outcome; `response` and `latency_ms` are empty while it runs."""

    __tablename__ = "vlm_traces"
    __table_args__ = (Index(None, "job_id", "created_at", "vlm_trace_id"),)

    vlm_trace_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.job_id", ondelete="CASCADE"))
    job_variants_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("jobs_variants.job_variants_id", ondelete="CASCADE"), index=True
    )
    provider: Mapped[str] = mapped_column(String(32))
    operation_type: Mapped[str] = mapped_column(String(16))
    request: Mapped[dict[str, Any]]
    response: Mapped[dict[str, Any] | None]
    latency_ms: Mapped[int | None]
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime.datetime] = mapped_column(default=now, onupdate=now)


class Event(Table):
    """What a change leads to: written in the same transaction as the change, and delivered at least once."""

    __tablename__ = "outbox_events"
    __table_args__ = (Index(None, "state", "due_at"),)

    event_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    job_id: Mapped[uuid.UUID] = _of_job()
    kind: Mapped[str] = mapped_column(String(32))
    payload: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    """`pending`, `delivered`, `dead` after the last attempt, or `no_webhook` if there was none to deliver it to."""
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime.datetime]
    """When it is tried next; while one process tries it, when another may."""
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime.datetime] = mapped_column(default=now, onupdate=now)


class IdempotencyKey(Table):
    """A key that a tenant has sent with a request, and the answer to it."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    job_id: Mapped[uuid.UUID] = _of_job()
    fingerprint: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the request that it came with."""
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[datetime.datetime] = mapped_column(default=now)
