"""The states of a variant: who may start what, who holds it, and what is left on record."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from serve.errors import DureError
from serve.services.adverts.stages import JUDGE, VALIDATE, Stage, VariantKey, failure
from tests.store.conftest import LEASE_S, Scenario, Store

VERDICT = {"is_valid": True}


async def begin(store: Store, stage: Stage, key: VariantKey, call: uuid.UUID | None = None) -> uuid.UUID:
    call = call or uuid.uuid4()
    sources = await store.stages.sources(stage, key, call)
    assert await store.stages.start(stage, key, call, sources.revision, {"asked": "this"})
    return call


async def done(store: Store, stage: Stage, key: VariantKey) -> uuid.UUID:
    call = await begin(store, stage, key)
    assert await store.stages.end(stage, key, call, VERDICT, 12, None)
    return call


async def state(store: Store, key: VariantKey) -> str:
    [variant] = (await store.views.job(key.tenant_id, key.job_id))["variants"]
    return f"{variant['step']}/{variant['status']}"


async def traces(store: Store, key: VariantKey) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await store.views.traces(key.tenant_id, key.job_id, None, 100))["traces"]
    return found


async def overlaid(store: Store, key: VariantKey) -> None:
    await store.jobs.record_overlay(key, uuid.uuid4(), None, {"render": {"url": "x"}})


async def status_of(attempt: Any) -> int:
    with pytest.raises(DureError) as caught:
        await attempt
    return caught.value.status


def test_a_variant_goes_from_its_image_to_a_judged_advert(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        assert await state(store, key) == "img_gen/done"
        first = await begin(store, VALIDATE, key)
        assert await state(store, key) == "vlm_analyze/running"
        assert await store.stages.end(VALIDATE, key, first, VERDICT, 12, None)
        assert await state(store, key) == "vlm_analyze/done"
        await overlaid(store, key)
        assert await state(store, key) == "overlay/done"
        second = await done(store, JUDGE, key)
        assert await state(store, key) == "vlm_judge/done"
        found = await traces(store, key)
        assert [trace["vlm_trace_id"] for trace in found] == [str(first), str(second)]
        assert [trace["operation_type"] for trace in found] == ["analyze", "judge"]
        assert all(trace["provider"] == "llava" and trace["latency_ms"] == 12 for trace in found)
        assert found[0]["response"] == VERDICT
        assert [event["type"] for event in await store.outbox.list("a", None, 10)] == ["ocr_eval", "yolo_detect"]

    run(scenario)


def test_stages_start_only_from_where_they_may(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        assert await status_of(begin(store, JUDGE, key)) == 400
        await done(store, VALIDATE, key)
        await done(store, VALIDATE, key)  # once more
        await overlaid(store, key)
        assert await status_of(begin(store, VALIDATE, key)) == 400
        await done(store, JUDGE, key)
        assert await status_of(begin(store, JUDGE, key)) == 400
        assert len(await traces(store, key)) == 3, "what is refused leaves no trace"

    run(scenario)


def test_of_many_calls_at_once_one_starts(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        tries = await asyncio.gather(*(begin(store, VALIDATE, key) for _ in range(8)), return_exceptions=True)
        refused = [each for each in tries if isinstance(each, DureError)]
        assert len(refused) == 7
        assert {each.status for each in refused} == {409}
        assert len(await traces(store, key)) == 1

    run(scenario)


def test_nothing_else_moves_a_variant_that_is_running(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        await begin(store, VALIDATE, key)
        assert await status_of(overlaid(store, key)) == 409
        assert await status_of(store.jobs.check_overlay(key)) == 409
        assert await state(store, key) == "vlm_analyze/running"

    run(scenario)


def test_a_stage_that_failed_says_why_and_may_start_again(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        call = await begin(store, VALIDATE, key)
        assert await store.stages.end(VALIDATE, key, call, failure("model_failed", "no luck"), 5, "no luck")
        [variant] = (await store.views.job("a", key.job_id))["variants"]
        assert (variant["status"], variant["reason"]) == ("failed", "no luck")
        assert variant["verdicts"] == {"analyze": None, "judge": None}
        assert await store.outbox.list("a", None, 10) == []
        await done(store, VALIDATE, key)
        assert [step["status"] for step in (await store.views.job("a", key.job_id))["variants"][0]["steps"]] == [
            "failed",
            "done",
        ]

    run(scenario)


def test_a_call_that_is_made_again_is_the_same_call(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        call = await begin(store, VALIDATE, key)
        await begin(store, VALIDATE, key, call)
        for _ in range(2):
            assert await store.stages.end(VALIDATE, key, call, VERDICT, 12, None)
        assert len(await traces(store, key)) == 1
        assert len(await store.outbox.list("a", None, 10)) == 1

    run(scenario)


def test_the_lease_of_a_dead_call_ends_and_that_of_a_living_one_does_not(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        dead, living = await store.new_job(), await store.new_job()
        lost, held = await begin(store, VALIDATE, dead), await begin(store, VALIDATE, living)
        for _ in range(4):
            await asyncio.sleep(LEASE_S / 3)
            assert await store.stages.renew(held, {"tokens": 7})
        assert await store.stages.expire() == 1
        assert await store.stages.expire() == 0
        assert await state(store, dead) == "vlm_analyze/failed"
        assert await state(store, living) == "vlm_analyze/running"
        assert (await store.views.progress("a", living.job_id)).variants[0]["progress"] == {"tokens": 7}
        [trace] = await traces(store, dead)
        assert trace["response"]["error"]["type"] == "lease_expired"
        assert trace["latency_ms"] >= 1000 * LEASE_S
        assert not await store.stages.renew(lost, None)
        assert not await store.stages.end(VALIDATE, dead, lost, VERDICT, 12, None), "it comes too late"
        assert (await traces(store, dead))[0]["response"]["error"]["type"] == "lease_expired"
        assert await status_of(begin(store, VALIDATE, dead, lost)) == 409
        await done(store, VALIDATE, dead)

    run(scenario)


def test_a_variant_that_changes_between_look_and_start_is_looked_at_again(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        await overlaid(store, key)
        sources = await store.stages.sources(JUDGE, key, uuid.uuid4())
        await overlaid(store, key)
        assert not await store.stages.start(JUDGE, key, uuid.uuid4(), sources.revision, {})
        assert await traces(store, key) == []

    run(scenario)


def test_another_tenants_variant_is_not_there(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job("a")
        other = VariantKey("b", key.job_id, key.job_variants_id)
        assert await status_of(begin(store, VALIDATE, other)) == 404
        assert await status_of(overlaid(store, other)) == 404
        assert await status_of(store.views.job("b", key.job_id)) == 404
        assert await status_of(store.views.traces("b", key.job_id, None, 10)) == 404
        assert await status_of(store.views.progress("b", key.job_id)) == 404
        assert (await store.views.traces("b", None, None, 10))["traces"] == []

    run(scenario)


def test_the_newest_ad_copy_that_is_done_comes_before_the_description(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        plain = await store.new_job()
        sources = await store.stages.sources(VALIDATE, plain, uuid.uuid4())
        assert (sources.ad_copy_eng, sources.desc_eng) == (None, "A red mug")
        written = await store.new_job(ad_copy_eng="Mugs for slow mornings")
        sources = await store.stages.sources(VALIDATE, written, uuid.uuid4())
        assert sources.ad_copy_eng == "Mugs for slow mornings"

    run(scenario)


def test_the_overlay_of_another_variant_is_refused(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key, other = await store.new_job(), await store.new_job()
        await overlaid(store, key)
        made = await store.jobs.record_overlay(other, uuid.uuid4(), None, {"render": {"url": "theirs"}})
        theirs = uuid.UUID(made["overlay_id"])
        assert await status_of(store.stages.sources(JUDGE, key, uuid.uuid4(), theirs)) == 404
        sources = await store.stages.sources(JUDGE, other, uuid.uuid4(), theirs)
        assert sources.render_url == "theirs"

    run(scenario)
