"""The adverts service: jobs, the two stages in which a vision model looks at them, and the record of both."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle

from deployments.load_progress import LoadEvent
from deployments.messages import Question
from serve import errors
from serve.board.watch import TROUBLE
from serve.caller import Caller
from serve.calls.graph import Graph
from serve.config.settings import CacheSettings, Settings
from serve.images.remote import fetch
from serve.images.uploaded import look_at
from serve.progress import Following
from serve.services.adverts import stages
from serve.services.adverts.janitor import Janitor
from serve.services.adverts.jobs import Image, Jobs, NewJob
from serve.services.adverts.stage_calls import StageCalls, StageRequest
from serve.services.adverts.stages import Sources, Stages, VariantKey
from serve.services.adverts.uploads import NewFile, Uploads
from serve.services.adverts.verdicts import JUDGE, Judgement, Validation, validation_prompt
from serve.services.adverts.views import Progress, Views
from serve.services.adverts.webhook import Dispatcher
from serve.services.base import Service
from serve.store import locations, migrate
from serve.store.assets import Assets
from serve.store.database import PATIENCE_S, Database
from serve.store.outbox import Outbox, State

logger = logging.getLogger("ray.serve")

RUNS = LoadEvent("ready", 100.0, "Ready", "준비 완료")
MAX_FOLLOWERS = 256
"""Followers of jobs, per replica."""
CLAIM_SLACK_S = 30.0
LONGEST_SHOWN = 100
"""Characters of client input that a message repeats."""


class Adverts(Service):
    """Methods that change something take the ids of what they create, so that a call can be repeated."""

    max_streams = MAX_FOLLOWERS

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, models: dict[str, DeploymentHandle]
    ) -> None:
        self.settings = settings
        url = locations.database(settings.store)
        await asyncio.to_thread(migrate.make_ready, url, PATIENCE_S)
        self.database = Database(url)
        self.assets = Assets(locations.assets(settings.store))
        self.jobs, self.views = Jobs(self.database), Views(self.database)
        webhook = settings.webhook
        self.stages = Stages(self.database, settings.adverts.lease_s, to_webhook=webhook is not None)
        self.outbox = Outbox(self.database, (webhook.timeout_s if webhook else 0) + CLAIM_SLACK_S)
        self.dispatcher = Dispatcher(self.outbox, webhook) if webhook else None
        self.uploads = Uploads(self.database, self.assets)
        self.janitor = Janitor(self.stages, self.jobs, self.outbox, self.uploads, settings, self._report)
        self.trouble = ""
        self.followers = 0
        self.calls = StageCalls(self.stages, self.dispatcher.wake if self.dispatcher else lambda: None)
        self.graph = Graph.of(settings.model_copy(update={"cache": CacheSettings(ttl_s=0)}), models, {}, patient=True)
        self.graph.start()
        self.janitor.start()
        if self.dispatcher:
            self.dispatcher.start()

    async def create_job(self, new: NewJob, content: bytes) -> dict[str, Any]:
        """The ids of the new job. Raises DureError."""
        if (known := await self.jobs.answered(new)) is not None:
            return known
        file = NewFile(new.tenant_id, new.job_id, new.image.path, content)
        answer = await self.uploads.kept(file, functools.partial(self.jobs.create, new))
        if answer["image_asset_id"] != str(new.image.image_asset_id):  # a request with the same key came first
            self.uploads.take_back(file.path)
        return answer

    async def record_overlay(
        self,
        key: VariantKey,
        overlay_id: uuid.UUID,
        image: Image | None,
        content: bytes,
        layout: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Record a finished advert; returns its ids. Raises DureError while a stage is running."""
        if image is None:
            return await self.jobs.record_overlay(key, overlay_id, None, layout)
        await self.jobs.check_overlay(key)
        file = NewFile(key.tenant_id, key.job_id, image.path, content)
        record = functools.partial(self.jobs.record_overlay, key, overlay_id, image, layout)
        return await self.uploads.kept(file, record)

    async def view(self, tenant_id: str, job_id: uuid.UUID) -> dict[str, Any]:
        return await self.views.job(tenant_id, job_id)

    async def traces(self, tenant_id: str, job_id: uuid.UUID | None, after: str | None, limit: int) -> dict[str, Any]:
        return await self.views.traces(tenant_id, job_id, after, limit)

    async def events(self, tenant_id: str, state: State | None, limit: int) -> list[dict[str, Any]]:
        return await self.outbox.list(tenant_id, state, limit)

    async def deliver_again(self, tenant_id: str, event_id: uuid.UUID) -> dict[str, Any]:
        """Returns the event as it is then. Raises DureError if there is none, or no webhook to deliver it to."""
        if self.dispatcher is None:
            raise errors.conflict("no webhook is configured to deliver events to; set `webhook` in the config")
        return await self.outbox.deliver_again(tenant_id, event_id)

    async def delete(self, tenant_id: str, job_id: uuid.UUID | None) -> int:
        """Delete one job, or all of a tenant's, rows and files; returns how many. Raises a 404 for an unknown job."""
        count = await self.janitor.delete(tenant_id, job_id)
        if job_id is not None and not count:
            raise errors.not_found(f"no job {job_id}", "job_id")
        return count

    async def validate(
        self,
        key: VariantKey,
        call: uuid.UUID,
        model: str | None,
        ad_copy_text: str | None,
        prompt: str | None,
        *,
        caller: Caller,
        following: Following | None = None,
    ) -> dict[str, Any]:
        """Stage 1. Raises DureError."""

        async def ask(sources: Sources) -> StageRequest:
            ad_copy = next((text for text in (ad_copy_text, sources.ad_copy_eng, sources.desc_eng) if text), None)
            if ad_copy is None:
                raise errors.invalid("the job has no ad copy; send ad_copy_text", "ad_copy_text")
            if sources.image is None:
                raise errors.invalid("the variant has no image", "job_variants_id")
            fields = {"ad_copy_text": ad_copy, "prompt": prompt}
            return await self._request(
                key.tenant_id, model, sources.image, validation_prompt(ad_copy, prompt), Validation, fields
            )

        return await self.calls.run(stages.VALIDATE, key, call, caller, ask, following=following)

    async def judge(
        self,
        key: VariantKey,
        call: uuid.UUID,
        model: str | None,
        overlay_id: uuid.UUID | None,
        render_asset_url: str | None,
        *,
        caller: Caller,
        following: Following | None = None,
    ) -> dict[str, Any]:
        """Stage 2. Raises DureError."""

        async def ask(sources: Sources) -> StageRequest:
            fields = {"overlay_id": overlay_id and str(overlay_id), "render_asset_url": render_asset_url}
            if render_asset_url:
                image = await self._image_at(key.tenant_id, render_asset_url, "render_asset_url")
            elif sources.overlaid_image:
                image = sources.overlaid_image
            elif sources.render_url:
                image = await self._image_at(key.tenant_id, sources.render_url, "render.url")
            else:
                raise errors.invalid("there is no finished advert; record an overlay first", "render_asset_url")
            return await self._request(key.tenant_id, model, image, JUDGE, Judgement, fields)

        return await self.calls.run(stages.JUDGE, key, call, caller, ask, overlay_id, following)

    async def follow(self, tenant_id: str, job_id: uuid.UUID) -> AsyncIterator[Progress]:
        """A job's progress, each time it advances. Raises DureError."""
        if self.followers >= MAX_FOLLOWERS:
            raise errors.at_capacity("adverts")
        self.followers += 1
        try:
            async for progress in self.views.follow(tenant_id, job_id):
                yield progress
        finally:
            self.followers -= 1

    def _report(self, trouble: str) -> None:
        """Report to the board what keeps files from being written, if that has changed."""
        if trouble == self.trouble:
            return
        logger.error("%s", trouble) if trouble else logger.warning("files can be written again")
        self.trouble = trouble
        self.graph.reporter.event(RUNS)
        self.graph.reporter.facts({TROUBLE: trouble})

    async def _image_at(self, tenant_id: str, url: str, param: str) -> str | bytes:
        """The path of one of the tenant's images, or the content of an image at a URL."""
        if "\0" in url:
            raise errors.invalid(f"{param} has a NUL character", param)
        if "://" not in url and not url.startswith("//"):
            path = await self.views.asset_path(tenant_id, url)
            if path is None:
                raise errors.not_found(f"{param}: there is no image {url[:LONGEST_SHOWN]!r}", param)
            return path
        limits = self.settings.limits
        content = await fetch(url, self.settings.fetch, int(limits.max_image_mb * 2**20), param)
        await look_at(content, limits, param)
        return content

    async def _request(
        self,
        tenant_id: str,
        model: str | None,
        image: str | bytes,
        prompt: str,
        verdict: type[BaseModel],
        fields: dict[str, Any],
    ) -> StageRequest:
        served = self.graph.model("vision", model)
        content = await self.assets.read(image) if isinstance(image, str) else image
        record = {
            **fields,
            "image": image if isinstance(image, str) else None,
            "model": served.name,
            "question": prompt,
        }
        question = Question(content, prompt, json.dumps(verdict.model_json_schema()), tenant_id)
        return StageRequest(served, question, verdict, record)
