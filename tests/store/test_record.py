"""Jobs, pages of traces, events, deletion, and a database that goes away for a moment."""

from __future__ import annotations

import asyncio
import base64
import datetime
import threading
import time
import uuid
from collections.abc import Callable

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from serve.errors import DureError
from serve.services.adverts.stages import JUDGE, VALIDATE
from serve.store import outbox
from serve.store.database import Database, Unavailable
from serve.store.outbox import State
from serve.store.tables import Event, now
from tests.postgres import Postgres
from tests.store.conftest import Scenario, Store, image, new_job
from tests.store.test_stages import begin, done, overlaid, state, status_of


def test_a_job_shows_what_it_was_given_and_how_far_it_is(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        new = new_job(ad_copy_eng="Mugs!")
        await store.jobs.create(new)
        job = await store.views.job("a", new.job_id)
        assert (job["desc_eng"], job["ad_copy_eng"]) == ("A red mug", "Mugs!")
        [variant] = job["variants"]
        assert variant["img_path"] == new.image.path
        assert variant["overlaid_img_path"] is None
        assert datetime.datetime.fromisoformat(job["created_at"]).utcoffset() == datetime.timedelta(0)

    run(scenario)


def test_a_repeat_with_the_same_key_makes_nothing_new(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        keyed = [new_job(idempotency_key="k", fingerprint="one") for _ in range(6)]
        answers = await asyncio.gather(*(store.jobs.create(new) for new in keyed))
        assert len({answer["job_id"] for answer in answers}) == 1
        other = await store.jobs.create(new_job("b", idempotency_key="k", fingerprint="two"))
        assert other["job_id"] != answers[0]["job_id"], "keys are each tenant's own"
        assert await status_of(store.jobs.create(new_job(idempotency_key="k", fingerprint="two"))) == 422

    run(scenario)


def test_a_layout_stands_alone_and_so_does_an_image(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        made = image(key.job_id)
        await store.jobs.record_overlay(key, uuid.uuid4(), made, None)
        sources = await store.stages.sources(JUDGE, key, uuid.uuid4())
        assert (sources.overlaid_image, sources.render_url) == (made.path, None)
        await store.jobs.record_overlay(key, uuid.uuid4(), None, {"render": {"url": "somewhere"}})
        sources = await store.stages.sources(JUDGE, key, uuid.uuid4())
        assert (sources.overlaid_image, sources.render_url) == (None, "somewhere")

    run(scenario)


def test_traces_come_page_by_page(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        calls = [str(await done(store, VALIDATE, key)) for _ in range(5)]
        seen: list[str] = []
        after = None
        while True:
            page = await store.views.traces("a", key.job_id, after, 2)
            seen += [trace["vlm_trace_id"] for trace in page["traces"]]
            after = page["next"]
            if after is None:
                break
        assert seen == calls
        for nonsense in ("nonsense", "", "\0", base64.urlsafe_b64encode(b"[" * 30_000).decode()):
            assert await status_of(store.views.traces("a", None, nonsense, 2)) == 400

    run(scenario)


def test_an_event_is_one_processs_until_its_claim_ends(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        call = await done(store, VALIDATE, key)
        claims = await asyncio.gather(*(store.outbox.claim(10) for _ in range(4)))
        [claimed] = [delivery for deliveries in claims for delivery in deliveries]
        assert (claimed.event_id, claimed.attempt) == (call, 1)
        assert claimed.payload["job_variants_id"] == str(key.job_variants_id)
        await asyncio.sleep(0.35)
        [again] = await store.outbox.claim(10)
        assert again.attempt == 2
        await store.outbox.failed(call, "no answer", 0.05)
        await asyncio.sleep(0.1)
        assert len(await store.outbox.claim(10)) == 1
        await store.outbox.failed(call, "no answer", None)
        await asyncio.sleep(0.35)
        assert await store.outbox.claim(10) == []
        [dead] = await store.outbox.list("a", "dead", 10)
        assert (dead["attempts"], dead["last_error"]) == (3, "no answer")
        assert await store.outbox.list("b", None, 10) == []
        assert await status_of(store.outbox.deliver_again("b", call)) == 404
        await store.outbox.deliver_again("a", call)
        assert len(await store.outbox.claim(10)) == 1
        await store.outbox.delivered(call)
        await asyncio.sleep(0.35)
        assert await store.outbox.claim(10) == []

    run(scenario)


async def written(store: Store, state: str, attempts: int, due_days_ago: float) -> uuid.UUID:
    """An event as an earlier version may have left it."""
    call = await done(store, VALIDATE, await store.new_job())
    due_at = now() - datetime.timedelta(days=due_days_ago)

    async def write(session: AsyncSession) -> None:
        values = {"state": state, "attempts": attempts, "due_at": due_at, "created_at": due_at}
        await session.execute(update(Event).where(Event.event_id == call).values(**values))

    await store.database.write(write)
    return call


async def claimed(store: Store) -> set[uuid.UUID]:
    return {delivery.event_id for delivery in await store.outbox.claim(100)}


async def in_state(store: Store, state: State) -> set[uuid.UUID]:
    return {uuid.UUID(event["event_id"]) for event in await store.outbox.list("a", state, 100)}


def test_without_a_webhook_an_event_is_kept_and_not_due(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        store.stages.to_webhook = False
        before = [await done(store, VALIDATE, await store.new_job()) for _ in range(3)]
        [event, *_] = await store.outbox.list("a", "no_webhook", 10)
        assert (event["state"], event["attempts"]) == ("no_webhook", 0)
        assert "no webhook" in event["last_error"]
        store.stages.to_webhook = True  # it is configured
        since = await done(store, VALIDATE, await store.new_job())
        await store.outbox.set_aside(to_webhook=True)
        assert await claimed(store) == {since}
        again = await store.outbox.deliver_again("a", before[0])
        assert (again["state"], again["last_error"]) == ("pending", None)
        await store.outbox.set_aside(to_webhook=True)
        assert await claimed(store) == {before[0]}
        assert await in_state(store, "no_webhook") == set(before[1:])

    run(scenario)


def test_what_nobody_has_tried_for_long_does_not_flood_a_webhook(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "AT_ONCE", 2)

    async def scenario(store: Store) -> None:
        days = outbox.UNTRIED_S / 86_400
        old = {await written(store, "pending", 0, days * ago) for ago in (1.01, 2, 3, 50, 400)}
        fresh = {await written(store, "pending", 0, days * ago) for ago in (0, 0.5, 0.99)}
        tried = {await written(store, "pending", 3, days * ago) for ago in (0.5, 5)}
        dead = {await written(store, "dead", 10, days * 5)}
        assert await claimed(store) == fresh | tried, "nor in the moment before it is put aside"
        assert await store.outbox.set_aside(to_webhook=True) == len(old)
        assert await in_state(store, "no_webhook") == old
        assert await in_state(store, "dead") == dead
        assert await store.outbox.set_aside(to_webhook=True) == 0

    run(scenario)


def test_where_there_is_no_webhook_any_more_nothing_stays_due(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        due = {await written(store, "pending", attempts, ago) for attempts, ago in ((0, 0), (0, 9), (4, 0.1))}
        being_tried = {await written(store, "pending", 1, -0.1)}
        delivered = {await written(store, "delivered", 1, 1)}
        assert await store.outbox.set_aside(to_webhook=False) == len(due)
        assert await in_state(store, "no_webhook") == due
        assert await in_state(store, "pending") == being_tried
        assert await in_state(store, "delivered") == delivered

    run(scenario)


def test_what_is_deleted_goes_with_all_that_belongs_to_it(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key, stays, other = await store.new_job(), await store.new_job(), await store.new_job("b")
        await done(store, VALIDATE, key)
        await overlaid(store, key)
        await store.jobs.record_overlay(key, uuid.uuid4(), image(key.job_id), None)
        held = await begin(store, JUDGE, key)
        assert await store.jobs.of_tenant("a", key.job_id, now(), 9) == [key.job_id]
        await store.jobs.forget([key.job_id])
        assert await status_of(store.views.job("a", key.job_id)) == 404
        assert not await store.stages.end(JUDGE, key, held, {}, 1, None), "its variant is gone"
        assert await store.outbox.list("a", None, 10) == []
        assert await state(store, stays) == "img_gen/done"
        assert await store.jobs.of_tenant("b", None, now(), 9) == [other.job_id]
        assert set(await store.jobs.tenants(now())) == {"a", "b"}
        assert await store.jobs.tenants(now() - datetime.timedelta(days=1)) == []

    run(scenario)


def test_a_follower_hears_of_each_change(run: Callable[[Scenario], None]) -> None:
    async def scenario(store: Store) -> None:
        key = await store.new_job()
        heard = store.views.follow("a", key.job_id)
        assert (await anext(heard)).variants[0]["step"] == "img_gen"
        call = await begin(store, VALIDATE, key)
        assert (await anext(heard)).variants[0]["status"] == "running"
        await store.stages.renew(call, {"ahead": 3})
        assert (await anext(heard)).variants[0]["progress"] == {"ahead": 3}
        await store.stages.end(VALIDATE, key, call, {}, 1, None)
        last = await anext(heard)
        assert last.variants[0]["status"] == "done"
        assert [event["type"] for event in last.events] == ["yolo_detect"]
        await store.jobs.forget([key.job_id])
        with pytest.raises(DureError):
            await anext(heard)

    run(scenario)


def test_a_database_that_is_started_anew_costs_nobody_an_error(server: Postgres) -> None:
    from serve.store import migrate

    url = server.database()
    migrate.migrate(url)

    async def scenario() -> None:
        store = Store(url)
        try:
            key = await store.new_job()
            restart = threading.Thread(target=lambda: (server.stop(), time.sleep(1), server.start()))
            restart.start()
            for _ in range(20):
                await done(store, VALIDATE, key)
                await asyncio.sleep(0.1)
            await asyncio.to_thread(restart.join)
            assert len((await store.views.traces("a", key.job_id, None, 100))["traces"]) == 20
        finally:
            await store.database.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_database_that_stays_away_is_said_to_be() -> None:
    async def scenario() -> None:
        database = Database("postgresql://postgres@127.0.0.1:9/none", patience_s=0.3)
        store = Store("postgresql://postgres@127.0.0.1:9/none")
        store.database = store.views.database = database
        with pytest.raises(Unavailable) as caught:
            await store.views.job("a", uuid.uuid4())
        assert caught.value.headers == {"Retry-After": "2"}
        await database.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
