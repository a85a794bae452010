"""Adverts as jobs: creating them, reading what is on record, and deleting them."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, File, Form, Header, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError
from starlette.datastructures import FormData
from starlette.datastructures import UploadFile as Upload

from serve import errors
from serve.caller import TENANT_PATTERN, Caller
from serve.calls.deployment import Deployment
from serve.config.settings import Limits
from serve.errors import DureError
from serve.http.early import calls
from serve.http.forms import FormRoute
from serve.http.json_values import check_json
from serve.http.requests import Body, CallerDep, GraphDep, answer, check_text
from serve.images.uploaded import look_at
from serve.metrics import measured
from serve.services.adverts.jobs import Image, NewJob
from serve.services.adverts.stages import VariantKey
from serve.store.outbox import State

router = APIRouter(prefix="/api/yh", tags=["adverts"], route_class=FormRoute)

MULTIPART, JSON = "multipart/form-data", "application/json"
MAX_LAYOUT_BYTES = 256 * 1024
MAX_PAGE = 500
MAX_CURSOR = 256

TenantId = Annotated[str, StringConstraints(pattern=TENANT_PATTERN)]
TENANT: TypeAdapter[str] = TypeAdapter(TenantId)
ModelName = Annotated[str, StringConstraints(max_length=64)]
Key = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]


async def _service(graph: GraphDep) -> Deployment:
    return graph.service("adverts", "a model with task vision")


Service = Annotated[Deployment, Depends(_service)]


class OverlayBody(Body):
    tenant_id: TenantId
    layout: Annotated[dict[str, Any], Field(min_length=1)]


@router.post("/jobs", status_code=201)
@calls(service="adverts", queued=False)
async def create_job(
    graph: GraphDep,
    caller: CallerDep,
    adverts: Service,
    tenant_id: Annotated[TenantId, Form()],
    image: Annotated[UploadFile, File()],
    desc_eng: Annotated[str | None, Form()] = None,
    ad_copy_eng: Annotated[str | None, Form()] = None,
    idempotency_key: Annotated[Key | None, Header()] = None,
) -> Response:
    """Create a job with its image and a first variant at img_gen/done. With an Idempotency-Key, repeating is safe."""
    limits = graph.settings.limits
    desc_eng = _text(desc_eng, "desc_eng", limits)
    ad_copy_eng = _text(ad_copy_eng, "ad_copy_eng", limits)
    job_id = uuid.uuid4()
    caller = replace(caller, tenant=tenant_id)
    with measured(adverts.name):
        async with adverts.gate.admitted(1, caller=caller):  # before the image takes up memory
            content = await image.read()
            new = NewJob(
                tenant_id,
                job_id,
                uuid.uuid4(),
                await _image(job_id, content, limits),
                desc_eng,
                ad_copy_eng,
                idempotency_key,
                _fingerprint(content, desc_eng, ad_copy_eng),
            )
            made = await adverts.call(new, content, method="create_job", caller=caller, admitted=True)
    return Response(orjson.dumps(made), 201, media_type="application/json")


@router.post("/jobs/{job_id}/variants/{job_variants_id}/overlay")
@calls(service="adverts", queued=False)
async def record_overlay(
    job_id: uuid.UUID,
    job_variants_id: uuid.UUID,
    request: Request,
    graph: GraphDep,
    caller: CallerDep,
    adverts: Service,
) -> Response:
    """Record the finished advert: multipart with `tenant_id` and `image`, or JSON with `tenant_id` and `layout`."""
    async with _overlay(request) as (tenant_id, upload, layout):  # outside the gate: a slow sender holds no place
        caller = replace(caller, tenant=tenant_id)
        with measured(adverts.name):
            async with adverts.gate.admitted(1, caller=caller):  # before the image takes up memory
                content = await upload.read() if upload else b""
                recorded = await adverts.call(
                    VariantKey(tenant_id, job_id, job_variants_id),
                    uuid.uuid4(),
                    await _image(job_id, content, graph.settings.limits) if upload else None,
                    content,
                    layout,
                    method="record_overlay",
                    caller=caller,
                    admitted=True,
                )
    return answer(recorded)


@router.get("/jobs/{job_id}")
async def show_job(
    job_id: uuid.UUID, tenant_id: Annotated[TenantId, Query()], caller: CallerDep, adverts: Service
) -> Response:
    """A job with its variants, their stages and the verdicts."""
    return answer(await _call(adverts, caller, "view", tenant_id, job_id))


@router.delete("/jobs/{job_id}")
async def delete_job(
    job_id: uuid.UUID, tenant_id: Annotated[TenantId, Query()], caller: CallerDep, adverts: Service
) -> Response:
    """Delete a job at once, rows and files."""
    return answer({"deleted": await _call(adverts, caller, "delete", tenant_id, job_id)})


@router.delete("/jobs")
async def delete_jobs(tenant_id: Annotated[TenantId, Query()], caller: CallerDep, adverts: Service) -> Response:
    """Delete all jobs of a tenant at once, rows and files."""
    return answer({"deleted": await _call(adverts, caller, "delete", tenant_id, None)})


@router.get("/traces")
async def list_traces(
    tenant_id: Annotated[TenantId, Query()],
    caller: CallerDep,
    adverts: Service,
    job_id: uuid.UUID | None = None,
    after: str | None = None,
    limit: Limit = 100,
) -> Response:
    """Questions to models and their answers, oldest first; `after` takes the `next` of the previous page."""
    if after is not None and len(after) > MAX_CURSOR:
        raise errors.invalid("`after` is not the `next` of a previous page", "after")
    return answer(await _call(adverts, caller, "traces", tenant_id, job_id, after, limit))


@router.get("/events")
async def list_events(
    tenant_id: Annotated[TenantId, Query()],
    caller: CallerDep,
    adverts: Service,
    state: State | None = None,
    limit: Limit = 100,
) -> Response:
    """Events of finished stages, newest first, with the state of their delivery.

    `state=dead` lists events that are no longer retried, `state=no_webhook` those made while no webhook was configured.
    """
    return answer({"events": await _call(adverts, caller, "events", tenant_id, state, limit)})


@router.post("/events/{event_id}/redeliver")
async def redeliver(
    event_id: uuid.UUID, tenant_id: Annotated[TenantId, Query()], caller: CallerDep, adverts: Service
) -> Response:
    """Deliver an event again, even if it is dead or was delivered."""
    return answer(await _call(adverts, caller, "deliver_again", tenant_id, event_id))


async def _call(adverts: Deployment, caller: Caller, method: str, tenant_id: str, *arguments: Any) -> Any:
    with measured(adverts.name):
        return await adverts.call(tenant_id, *arguments, method=method, caller=replace(caller, tenant=tenant_id))


@asynccontextmanager
async def _overlay(request: Request) -> AsyncIterator[tuple[str, Upload | None, dict[str, Any] | None]]:
    """The tenant and the finished advert: an upload, open until the block ends, or a layout."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (MULTIPART, JSON):
        message = f"the body's Content-Type is {kind[:100]!r}; send {MULTIPART} with an image, or {JSON} with a layout"
        raise DureError(415, "unsupported_media_type", message, "Content-Type")
    if kind == MULTIPART:
        async with _form(request) as form:
            upload = form.get("image")
            if not isinstance(upload, Upload):
                raise DureError(422, "invalid_request", "image: send a file here, or JSON as the body", "image")
            try:
                tenant_id = TENANT.validate_python(form.get("tenant_id"))
            except ValidationError as error:
                raise _request_error(error, "tenant_id") from error
            yield tenant_id, upload, None
            return
    encoded = b""
    async for part in request.stream():
        encoded += part
        if len(encoded) > MAX_LAYOUT_BYTES:
            raise errors.too_large(f"layout is over {MAX_LAYOUT_BYTES // 1024} kB", "layout")
    if b"\\u0000" in encoded:
        raise errors.invalid("layout has a NUL character", "layout")
    try:
        body = OverlayBody.model_validate_json(encoded)
    except ValidationError as error:
        raise _request_error(error) from error
    check_json(body.layout, "layout")
    yield body.tenant_id, None, body.layout


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    form = await request.form(max_files=1)
    try:
        yield form
    finally:
        await form.close()


async def _image(job_id: uuid.UUID, content: bytes, limits: Limits) -> Image:
    header = await look_at(content, limits)
    asset_id = uuid.uuid4()
    path = f"{job_id}/{asset_id}.{header.extension}"
    return Image(asset_id, path, header.media_type, header.width, header.height, len(content))


def _text(text: str | None, name: str, limits: Limits) -> str | None:
    text = (text or "").strip()
    check_text(text, name, limits)
    if "\0" in text:
        raise errors.invalid(f"{name} has a NUL character", name)
    return text or None


def _fingerprint(content: bytes, *texts: str | None) -> str:
    digest = hashlib.sha256(content)
    digest.update(orjson.dumps(texts))
    return digest.hexdigest()


def _request_error(error: ValidationError, *at: str) -> RequestValidationError:
    problems = error.errors(include_url=False)
    return RequestValidationError([problem | {"loc": ("body", *at, *problem["loc"])} for problem in problems])
