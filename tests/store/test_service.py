"""The service over the store, with a model that does what a test wants: what is left on record, whatever happens."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.messages import Answer
from serve import errors
from serve.caller import Caller
from serve.config.model import ModelSettings
from serve.config.settings import Settings, StoreSettings
from serve.errors import DureError
from serve.progress import Following
from serve.services.adverts.janitor import Janitor
from serve.services.adverts.service import Adverts
from serve.services.adverts.stage_calls import StageCalls
from serve.services.adverts.stages import EXPIRED, VariantKey
from serve.services.adverts.uploads import Uploads
from serve.services.adverts.verdicts import Validation
from serve.store.assets import Assets
from tests.store.conftest import LEASE_S, Scenario, Store, image
from tests.store.test_stages import state, status_of, traces

VERDICT = Validation.model_validate(
    {
        "analysis": "A red mug.",
        "is_valid": True,
        "image_quality_ok": True,
        "relevance_score": 0.9,
        "issues": [],
        "recommendations": [],
        "font_recommendation": {"style": "bold", "size": "large", "color": "light"},
    }
)


class Model:
    name = "vision"

    def __init__(self) -> None:
        self.asked = 0
        self.behaviour: Callable[[], Awaitable[Any]] = self.answer

    async def answer(self) -> list[Answer]:
        return [Answer(VERDICT.model_dump_json(), 50)]

    async def results(self, requests: Any, caller: Caller, param: str, following: Following) -> Any:
        self.asked += 1
        return await self.behaviour()


class Graph:
    def __init__(self, model: Model) -> None:
        self.only = model

    def model(self, task: str, name: str | None = None) -> Model:
        if name not in (None, "vision"):
            raise errors.not_found("no such model", "model")
        return self.only


def service(store: Store, folder: Path) -> tuple[Any, Model]:
    adverts: Any = Adverts.__new__(Adverts)
    model = Model()
    settings = Settings(models={"vision": ModelSettings(task="vision", source="x")})
    adverts.settings, adverts.graph = settings, Graph(model)
    adverts.stages, adverts.jobs, adverts.views = store.stages, store.jobs, store.views
    adverts.assets, adverts.calls = Assets(str(folder)), StageCalls(store.stages, lambda: None)
    adverts.outbox, adverts.dispatcher = store.outbox, None
    adverts.uploads = Uploads(store.database, adverts.assets)
    adverts.janitor = Janitor(store.stages, store.jobs, store.outbox, adverts.uploads, settings, lambda _: None)
    return adverts, model


async def ready(store: Store, adverts: Any) -> VariantKey:
    key = await store.new_job()
    [variant] = (await store.views.job("a", key.job_id))["variants"]
    await adverts.assets.write(variant["img_path"], b"image")
    return key


def validate(adverts: Any, key: VariantKey, call: uuid.UUID | None = None, model: str | None = None) -> Any:
    return adverts.validate(key, call or uuid.uuid4(), model, None, None, caller=Caller.waiting(5.0, key.tenant_id))


def test_a_verdict_is_answered_as_it_is_on_record(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, tmp_path)
        key = await ready(store, adverts)
        answer = await validate(adverts, key)
        [trace] = await traces(store, key)
        assert answer == {
            "job_id": str(key.job_id),
            "vlm_trace_id": trace["vlm_trace_id"],
            **VERDICT.model_dump(),
        }
        assert trace["response"] == VERDICT.model_dump()

    run(scenario)


def test_a_call_made_again_after_its_end_has_the_same_answer(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    """The replica died before its answer was out; the caller makes the call again, with the same id."""

    async def scenario(store: Store) -> None:
        adverts, model = service(store, tmp_path)
        key = await ready(store, adverts)
        call = uuid.uuid4()
        first = await validate(adverts, key, call)
        assert await validate(adverts, key, call) == first
        assert model.asked == 1
        assert len(await traces(store, key)) == 1
        made = image(key.job_id)
        await adverts.record_overlay(key, uuid.uuid4(), made, b"advert", None)
        model.behaviour = judged
        call = uuid.uuid4()
        first = await adverts.judge(key, call, None, None, None, caller=Caller.waiting(5.0, key.tenant_id))
        assert await adverts.judge(key, call, None, None, None, caller=Caller.waiting(5.0, key.tenant_id)) == first
        assert await state(store, key) == "vlm_judge/done"

    async def judged() -> list[Answer]:
        told = '"on_brief":true,"occlusion":false,"contrast_ok":true,"cta_present":true,"issues":[]'
        return [Answer('{"analysis":"Good.",' + told + "}", 40)]

    run(scenario)


@pytest.mark.parametrize(
    ("failure", "kind", "status"),
    [
        (errors.too_late("vision", 5), "deadline_exceeded", 504),
        (errors.unavailable("vision"), "unavailable", 503),
        (errors.invalid("the image can't be read", "image"), "invalid_request", 400),
        (RuntimeError("a bug"), "internal", 500),
    ],
)
def test_a_model_that_fails_leaves_one_trace_that_says_why(
    run: Callable[[Scenario], None], tmp_path: Path, failure: Exception, kind: str, status: int
) -> None:
    async def fail() -> Any:
        raise failure

    async def scenario(store: Store) -> None:
        adverts, model = service(store, tmp_path)
        model.behaviour = fail
        key = await ready(store, adverts)
        assert await status_of(validate(adverts, key)) == status
        assert await state(store, key) == "vlm_analyze/failed"
        [trace] = await traces(store, key)
        assert trace["response"]["error"]["type"] == kind
        assert "a bug" not in str(trace["response"])

    run(scenario)


def test_what_is_refused_leaves_nothing(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, model = service(store, tmp_path)
        key = await ready(store, adverts)
        assert await status_of(validate(adverts, key, model="another")) == 404
        assert (
            await status_of(
                adverts.judge(key, uuid.uuid4(), None, None, None, caller=Caller.waiting(5.0, key.tenant_id))
            )
            == 400
        )
        assert (await state(store, key), await traces(store, key), model.asked) == ("img_gen/done", [], 0)
        made = image(key.job_id)
        model.behaviour = asyncio.Event().wait
        running = asyncio.ensure_future(validate(adverts, key))
        await asyncio.sleep(0.3)
        refused = adverts.record_overlay(key, uuid.uuid4(), made, b"advert", None)
        assert await status_of(refused) == 409
        assert not (tmp_path / made.path).exists(), "what is not on record has no file"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.gather(*adverts.calls.ending)

    run(scenario)


def test_a_client_that_leaves_at_any_moment_leaves_nothing_running(
    run: Callable[[Scenario], None], tmp_path: Path
) -> None:
    async def slow() -> list[Answer]:
        await asyncio.sleep(0.02)
        return [Answer(VERDICT.model_dump_json(), 50)]

    async def scenario(store: Store) -> None:
        adverts, model = service(store, tmp_path)
        model.behaviour = slow
        draw = random.Random(3)
        seen = set()
        for _ in range(25):
            key = await ready(store, adverts)
            asking = asyncio.ensure_future(validate(adverts, key))
            await asyncio.sleep(draw.uniform(0, 0.08))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await asyncio.gather(*adverts.calls.ending)
            now = await state(store, key)
            seen.add(now)
            assert now in ("img_gen/done", "vlm_analyze/failed", "vlm_analyze/done")
            assert [bool(trace["response"]) for trace in await traces(store, key)] == [True] * (now[0] == "v")
        assert "vlm_analyze/failed" in seen

    run(scenario)


def test_a_call_whose_lease_was_taken_gives_up(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, model = service(store, tmp_path)
        model.behaviour = asyncio.Event().wait
        key = await ready(store, adverts)
        asking = asyncio.ensure_future(validate(adverts, key))
        await asyncio.sleep(0.1)
        renew, store.stages.renew = store.stages.renew, away  # type: ignore[method-assign]
        await asyncio.sleep(1.2 * LEASE_S)
        assert await store.stages.expire() == 1
        store.stages.renew = renew  # type: ignore[method-assign]
        with pytest.raises(DureError) as caught:
            await asking
        assert caught.value.status == 409
        [trace] = await traces(store, key)
        assert trace["response"]["error"]["message"] == EXPIRED
        assert await state(store, key) == "vlm_analyze/failed"

    async def away(*_: Any) -> bool:
        raise errors.no_files()

    run(scenario)


def test_old_jobs_go_when_their_tenant_wants(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, tmp_path)
        kept, gone = await store.new_job("keeps"), await store.new_job("forgets")
        for key in (kept, gone):
            [variant] = (await store.views.job(key.tenant_id, key.job_id))["variants"]
            await adverts.assets.write(variant["img_path"], b"image")
        day_s = 1 / 86_400
        retention = StoreSettings(retention_days=0.2 * day_s, tenant_retention_days={"keeps": 100})
        adverts.janitor.settings = adverts.settings.model_copy(update={"store": retention})
        await asyncio.sleep(0.3)
        await adverts.janitor._tidy()
        assert await status_of(store.views.job("forgets", gone.job_id)) == 404
        assert not (tmp_path / str(gone.job_id)).exists()
        assert await state(store, kept) == "img_gen/done"
        assert list((tmp_path / str(kept.job_id)).iterdir())

    run(scenario)


def test_nothing_is_delivered_again_where_there_is_no_webhook(run: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, tmp_path)
        call = uuid.uuid4()
        await validate(adverts, await ready(store, adverts), call)
        with pytest.raises(DureError, match="no webhook is configured") as caught:
            await adverts.deliver_again("a", call)
        assert caught.value.status == 409
        await adverts.janitor._tidy()
        assert [event["state"] for event in await adverts.events("a", None, 10)] == ["no_webhook"]

    run(scenario)


@pytest.mark.parametrize(
    "path", ["", "..", "../x", "a/../../x", "/etc/passwd", "a\0b", "..\\x", "file:///etc/passwd", "//host/x"]
)
def test_no_path_leads_out_of_the_assets(tmp_path: Path, path: str) -> None:
    assets = Assets(str(tmp_path / "assets"))

    async def attempts() -> None:
        for attempt in (assets.read(path), assets.write(path, b"x"), assets.delete(path)):
            assert await status_of(attempt) == 400

    asyncio.run(attempts())
    assert list(tmp_path.iterdir()) == []
