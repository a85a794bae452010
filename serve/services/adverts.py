"""Adverts: their jobs, the two stages in which a vision model looks at them, and the record of it all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle

from deployments.answers import News
from deployments.items import Answer, Question
from serve import errors
from serve.adverts import JUDGE, Judgement, Validation, validation_prompt
from serve.calls import Model
from serve.coalescer import Following
from serve.errors import DureError
from serve.fetching import fetch
from serve.graph import Graph
from serve.images import look_at
from serve.services.dispatcher import Dispatcher
from serve.services.janitor import Janitor
from serve.settings import CacheSettings, Settings
from serve.store import locations, schema, stages
from serve.store.assets import Assets
from serve.store.database import PATIENCE_S, Database, Unavailable
from serve.store.jobs import Image, Jobs, NewJob
from serve.store.outbox import Outbox, State
from serve.store.stages import Sources, Stage, Stages, Which
from serve.store.views import Progress, Views

logger = logging.getLogger("ray.serve")

STARTS = 3
"""How often a stage is begun anew because its variant has changed meanwhile."""
RENEWALS = 4
"""Of a lease before it would end."""
FIRST_RENEWAL_S, LONGEST_RENEWAL_S = 0.2, 1.0
"""Renewing also tells followers how far the call is."""
MAX_FOLLOWERS = 256
"""Of jobs, per replica."""
CLAIM_SLACK_S = 30.0


@dataclass(frozen=True)
class Asked:
    """What a model is to be asked in a stage."""

    model: Model
    question: Question
    verdict: type[BaseModel]
    record: dict[str, Any]
    """Of it, for the trace."""
    gone: bool = False
    """Nobody waits for the answer any more."""


class Adverts:
    """Whatever changes something takes the ids of what it makes, so that a call can be made again."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, models: dict[str, DeploymentHandle]
    ) -> None:
        self.settings = settings
        url = locations.database(settings.store)
        await asyncio.to_thread(schema.make_ready, url, PATIENCE_S)
        self.database = Database(url)
        self.assets = Assets(locations.assets(settings.store))
        self.jobs, self.views = Jobs(self.database), Views(self.database)
        self.stages = Stages(self.database, settings.adverts.lease_s)
        webhook = settings.webhook
        self.outbox = Outbox(self.database, (webhook.timeout_s if webhook else 0) + CLAIM_SLACK_S)
        self.dispatcher = Dispatcher(self.outbox, webhook) if webhook else None
        self.janitor = Janitor(self.stages, self.jobs, self.assets, settings)
        self.followers = 0
        self.ending: set[asyncio.Task[Any]] = set()
        self.graph = Graph.of(settings.model_copy(update={"cache": CacheSettings(ttl_s=0)}), models, {}, patient=True)
        self.graph.start()
        self.janitor.start()
        if self.dispatcher:
            self.dispatcher.start()

    async def create_job(self, new: NewJob, content: bytes) -> dict[str, Any]:
        """The ids of the new job. Raises DureError for an image that can't be read."""
        async with self._file(new.image.path, content):
            answer = await self.jobs.create(new)
        if answer["image_asset_id"] != str(new.image.image_asset_id):  # the key was known
            await self.assets.delete(new.image.path)
        return answer

    async def record_overlay(
        self, which: Which, overlay_id: uuid.UUID, image: Image | None, content: bytes, layout: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Its id. Raises DureError while a stage is running."""
        if image is None:
            return await self.jobs.record_overlay(which, overlay_id, None, layout)
        await self.jobs.may_overlay(which)
        async with self._file(image.path, content):
            return await self.jobs.record_overlay(which, overlay_id, image, layout)

    @contextlib.asynccontextmanager
    async def _file(self, path: str, content: bytes) -> AsyncIterator[None]:
        """A file that stays only if it comes to be on record."""
        await self.assets.write(path, content)
        try:
            yield
        except Unavailable:  # it may be on record nevertheless
            raise
        except DureError:
            await self.assets.delete(path)
            raise

    async def view(self, tenant_id: str, job_id: uuid.UUID) -> dict[str, Any]:
        return await self.views.job(tenant_id, job_id)

    async def traces(self, tenant_id: str, job_id: uuid.UUID | None, after: str | None, limit: int) -> dict[str, Any]:
        return await self.views.traces(tenant_id, job_id, after, limit)

    async def events(self, tenant_id: str, state: State | None, limit: int) -> list[dict[str, Any]]:
        return await self.outbox.list(tenant_id, state, limit)

    async def deliver_again(self, tenant_id: str, event_id: uuid.UUID) -> dict[str, Any]:
        return await self.outbox.deliver_again(tenant_id, event_id)

    async def delete(self, tenant_id: str, job_id: uuid.UUID | None) -> int:
        """Delete one job, or all of a tenant's, rows and files; how many there were. Raises a 404 for no such job."""
        count = await self.janitor.delete(tenant_id, job_id)
        if job_id is not None and not count:
            raise errors.not_found(f"no job {job_id}", "job_id")
        return count

    async def validate(
        self,
        which: Which,
        call: uuid.UUID,
        model: str | None,
        ad_copy_text: str | None,
        prompt: str | None,
        timeout_s: float,
    ) -> dict[str, Any]:
        """Stage 1. Raises DureError."""

        async def ask(sources: Sources) -> Asked:
            ad_copy = next((text for text in (ad_copy_text, sources.ad_copy_eng, sources.desc_eng) if text), None)
            if ad_copy is None:
                raise errors.invalid("the job has no ad copy; send ad_copy_text", "ad_copy_text")
            if sources.image is None:
                raise errors.invalid("the variant has no image", "job_variants_id")
            told = {"ad_copy_text": ad_copy, "prompt": prompt}
            return await self._asked(model, sources.image, validation_prompt(ad_copy, prompt), Validation, told)

        return await self._stage(stages.VALIDATE, which, call, timeout_s, ask)

    async def judge(
        self,
        which: Which,
        call: uuid.UUID,
        model: str | None,
        overlay_id: uuid.UUID | None,
        render_asset_url: str | None,
        timeout_s: float,
    ) -> dict[str, Any]:
        """Stage 2. Raises DureError."""

        async def ask(sources: Sources) -> Asked:
            told = {"overlay_id": overlay_id and str(overlay_id), "render_asset_url": render_asset_url}
            if render_asset_url:
                image = await self._named(which.tenant_id, render_asset_url, "render_asset_url")
            elif sources.overlaid_image:
                image = sources.overlaid_image
            elif sources.render_url:
                image = await self._named(which.tenant_id, sources.render_url, "render.url")
            else:
                raise errors.invalid("there is no finished advert; record an overlay first", "render_asset_url")
            return await self._asked(model, image, JUDGE, Judgement, told)

        return await self._stage(stages.JUDGE, which, call, timeout_s, ask, overlay_id)

    async def follow(self, tenant_id: str, job_id: uuid.UUID) -> AsyncIterator[Progress]:
        """How far a job is, each time that it has come further. Raises DureError."""
        if self.followers >= MAX_FOLLOWERS:
            raise errors.queue_full("adverts", self.followers, 10)
        self.followers += 1
        try:
            async for progress in self.views.follow(tenant_id, job_id):
                yield progress
        finally:
            self.followers -= 1

    async def _named(self, tenant_id: str, url: str, param: str) -> str | bytes:
        """The path of an image of the tenant's, or what lies at a URL."""
        if "\0" in url:
            raise errors.invalid(f"{param} has a NUL character", param)
        if "://" not in url and not url.startswith("//"):
            path = await self.views.asset_path(tenant_id, url)
            if path is None:
                raise errors.not_found(f"{param}: there is no image {url!r}", param)
            return path
        limits = self.settings.limits
        content = await fetch(url, self.settings.fetch, int(limits.max_image_mb * 2**20), param)
        await look_at(content, limits, param)
        return content

    async def _asked(
        self, model: str | None, image: str | bytes, prompt: str, verdict: type[BaseModel], told: dict[str, Any]
    ) -> Asked:
        asked = self.graph.model("vision", model)
        content = await self.assets.read(image) if isinstance(image, str) else image
        record = {**told, "image": image if isinstance(image, str) else None, "model": asked.name, "question": prompt}
        return Asked(asked, Question(content, prompt, json.dumps(verdict.model_json_schema())), verdict, record)

    async def _stage(
        self,
        stage: Stage,
        which: Which,
        call: uuid.UUID,
        timeout_s: float,
        ask: Callable[[Sources], Awaitable[Asked]],
        overlay_id: uuid.UUID | None = None,
    ) -> dict[str, Any]:
        """Start the stage, ask the model, and put on record what came of it, whatever that is."""
        started = time.monotonic()
        if known := await self.stages.outcome(which, call):
            return _answer(which, call, known)  # it is made again, by one who did not hear of its end
        asked = await self._start(stage, which, call, ask, overlay_id)
        verdict: dict[str, Any] | None = None
        problem: DureError | None = None
        gone = asked.gone
        try:
            if not gone:
                verdict = await self._verdict(stage, call, asked, started + timeout_s - time.monotonic())
        except DureError as error:
            problem = error
        except asyncio.CancelledError:
            gone = True
        except Exception:
            logger.exception("stage %s failed", stage.step)
            problem = errors.internal()
        if gone:
            problem = errors.gone()
        response = verdict if problem is None else stages.failure(problem.kind, problem.message)
        assert response is not None
        elapsed_ms = round(1000 * (time.monotonic() - started))
        ending = asyncio.get_running_loop().create_task(
            self.stages.end(stage, which, call, response, elapsed_ms, problem.message if problem else None)
        )
        self.ending.add(ending)
        ending.add_done_callback(self._ended)
        if gone:
            raise asyncio.CancelledError
        if not await asyncio.shield(ending):
            raise problem or stages.lost(stage)
        if problem is not None:
            raise problem
        return _answer(which, call, response)

    async def _start(
        self,
        stage: Stage,
        which: Which,
        call: uuid.UUID,
        ask: Callable[[Sources], Awaitable[Asked]],
        overlay_id: uuid.UUID | None,
    ) -> Asked:
        """What is to be asked in the stage, which has started. Raises DureError, and CancelledError, where it has not.

        A client that leaves just then is `gone` where the stage has started.
        """
        for _ in range(STARTS):
            sources = await self.stages.sources(stage, which, call, overlay_id)
            asked = await ask(sources)
            starting = asyncio.ensure_future(self.stages.start(stage, which, call, sources.revision, asked.record))
            try:
                started = await asyncio.shield(starting)
            except asyncio.CancelledError:
                if not await starting:
                    raise
                return replace(asked, gone=True)
            if started:
                return asked
        raise errors.conflict("the variant keeps changing; send the request again", "job_variants_id", 1)

    def _ended(self, ending: asyncio.Task[bool]) -> None:
        self.ending.discard(ending)
        if not ending.cancelled() and ending.exception():
            logger.error("what came of a stage is not on record: %r", ending.exception())
        elif self.dispatcher:
            self.dispatcher.wake()

    async def _verdict(self, stage: Stage, call: uuid.UUID, asked: Asked, timeout_s: float) -> dict[str, Any]:
        """What the model says. Raises DureError, also where the lease is lost."""
        following = Following()
        results = asked.model.results([asked.question], timeout_s, "image", following)
        asking = asyncio.ensure_future(results)
        holding = asyncio.ensure_future(self._hold(call, following))
        try:
            await asyncio.wait((asking, holding), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise stages.lost(stage)
            answers: list[Answer] = asking.result()
            return asked.verdict.model_validate_json(answers[0].json).model_dump()
        finally:
            for task in (asking, holding):
                task.cancel()
            await asyncio.gather(asking, holding, return_exceptions=True)

    async def _hold(self, call: uuid.UUID, following: Following) -> None:
        """Returns once the lease has been lost."""
        pause_s = FIRST_RENEWAL_S
        while True:
            await asyncio.sleep(min(pause_s, self.stages.lease_s / RENEWALS))
            pause_s = min(2 * pause_s, LONGEST_RENEWAL_S)
            told = {name: value for name, value in asdict(following.news or News()).items() if value is not None}
            try:
                if not await self.stages.renew(call, told):
                    return
            except Exception as error:  # a database that is away may be back before the lease ends
                logger.warning("a lease could not be renewed: %s", error)


def _answer(which: Which, call: uuid.UUID, response: dict[str, Any]) -> dict[str, Any]:
    """What is told of what is on record. Raises DureError where that is a failure."""
    if "error" in response:
        raise DureError(503, response["error"]["type"], response["error"]["message"], None, 1)
    return {"job_id": str(which.job_id), "vlm_trace_id": str(call), **response}
