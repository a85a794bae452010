"""Image files and their rows: whatever is cut short, nothing stays that nobody knows of."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import random
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from serve.errors import DureError
from serve.services.adverts import uploads
from serve.services.adverts.jobs import NewJob
from serve.services.adverts.stages import VALIDATE
from serve.services.adverts.uploads import FORGOTTEN_S, GIVEN_UP_S, NewFile, Uploads
from serve.store import assets
from serve.store.assets import Assets
from serve.store.database import Unavailable
from serve.store.tables import ImageAsset, PendingFile, now
from tests.store.conftest import Scenario, Store, image, new_job
from tests.store.test_service import service
from tests.store.test_stages import begin, status_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the images; the database may lie beside it."""
    made = tmp_path / "assets"
    made.mkdir()
    return made


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def folders(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def rows(store: Store, table: Any = ImageAsset) -> set[str]:
    async def read(session: AsyncSession) -> set[str]:
        return set(await session.scalars(select(table.path)))

    return await store.database.read(read)


def later(seconds: float) -> datetime.datetime:
    return now() + datetime.timedelta(seconds=seconds)


async def ended(adverts: Any) -> None:
    while adverts.uploads.clearing:
        await asyncio.gather(*adverts.uploads.clearing)


async def swept(adverts: Any) -> None:
    await adverts.uploads.sweep(later(GIVEN_UP_S + 1))
    await adverts.uploads.sweep(later(FORGOTTEN_S + 1))


async def nothing_is_lost(store: Store, folder: Path) -> None:
    """Each file is on record and each that is on record is there."""
    assert files(folder) == await rows(store)
    assert await rows(store, PendingFile) == set()
    assert folders(folder) == {path.partition("/")[0] for path in files(folder)}


def test_a_job_and_its_file_come_together(run: Callable[[Scenario], None], folder: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        new = new_job()
        write = adverts.assets.write

        async def watched(path: str, content: bytes) -> None:
            assert await rows(store, PendingFile) == {path}, "it is written down before it is written"
            assert await status_of(store.views.job("a", new.job_id)) == 404, "a job appears with its file"
            await write(path, content)

        adverts.assets.write = watched
        answer = await adverts.create_job(new, b"image")
        assert answer["job_id"] == str(new.job_id)
        assert (folder / new.image.path).read_bytes() == b"image"
        await store.views.job("a", new.job_id)
        await nothing_is_lost(store, folder)

    run(scenario)


def test_the_same_key_at_once_makes_one_job_and_one_file(run: Callable[[Scenario], None], folder: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        same = [new_job(idempotency_key="k", fingerprint="f") for _ in range(6)]
        answers = await asyncio.gather(*(adverts.create_job(new, b"image") for new in same))
        assert len({answer["job_id"] for answer in answers}) == 1
        await ended(adverts)
        assert files(folder) == await rows(store)
        assert len(files(folder)) == 1
        adverts.assets.write = None  # nothing is written for a key that is known
        again = await adverts.create_job(new_job(idempotency_key="k", fingerprint="f"), b"image")
        assert again == answers[0]
        other = new_job(idempotency_key="k", fingerprint="other")
        assert await status_of(adverts.create_job(other, b"image")) == 422
        await swept(adverts)
        await nothing_is_lost(store, folder)

    run(scenario)


def test_a_call_that_is_made_again_keeps_its_file(run: Callable[[Scenario], None], folder: Path) -> None:
    """Its replica died before the answer was out, or before the job was on record."""

    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        new = new_job()
        await adverts.uploads.pending.expect("a", new.job_id, new.image.path)
        await adverts.assets.write(new.image.path, b"half")
        first = await adverts.create_job(new, b"image")
        assert await adverts.create_job(new, b"image") == first
        await adverts.uploads.pending.expect("a", new.job_id, new.image.path)  # and that one died, too
        made = image(new.job_id)
        key = dataclasses.replace(await store.new_job(), job_id=new.job_id, job_variants_id=new.job_variants_id)
        overlay = uuid.uuid4()
        for _ in range(2):
            await adverts.record_overlay(key, overlay, made, b"advert", None)
        await swept(adverts)
        assert (folder / new.image.path).read_bytes() == b"image"
        assert (folder / made.path).read_bytes() == b"advert"
        assert await rows(store, PendingFile) == set()

    run(scenario)


@pytest.mark.parametrize("kept", [True, False], ids=["on record", "not on record"])
def test_where_it_is_unknown_whether_it_is_on_record_that_is_looked_up(
    run: Callable[[Scenario], None], folder: Path, kept: bool
) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        new = new_job()

        async def record() -> None:
            if kept:
                await store.jobs.create(new)
            raise Unavailable

        file = NewFile("a", new.job_id, new.image.path, b"image")
        with pytest.raises(Unavailable):
            await adverts.uploads.kept(file, record)
        assert files(folder) == ({new.image.path} if kept else set())
        if not kept:
            assert await status_of(store.jobs.create(new)) == 409, "it is too late for that"
        await swept(adverts)
        await nothing_is_lost(store, folder)

    run(scenario)


def test_a_client_that_leaves_at_any_await_leaves_nothing(run: Callable[[Scenario], None], folder: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        key = await store.new_job()
        await adverts.assets.write((await rows(store)).pop(), b"image")
        draw = random.Random(5)
        made = left = 0
        for turns in range(60):
            new = new_job(idempotency_key=f"k{turns}" if turns % 3 else None)
            calls = [adverts.create_job(new, b"image" * 1000)]
            if turns % 4 == 0:
                calls.append(adverts.record_overlay(key, uuid.uuid4(), image(key.job_id), b"advert", None))
            running = [asyncio.ensure_future(call) for call in calls]
            for _ in range(turns):
                await asyncio.sleep(0.001 * draw.random() if turns % 2 else 0)
            for each in running:
                each.cancel()
            results = await asyncio.gather(*running, return_exceptions=True)
            made += isinstance(results[0], dict)
            left += isinstance(results[0], asyncio.CancelledError)
        await ended(adverts)
        assert left > 10
        assert files(folder) == await rows(store), "no sweep is needed where the process goes on"
        await swept(adverts)
        await nothing_is_lost(store, folder)

    run(scenario)


async def cut_short(store: Store, adverts: Any, tenant: str, job_id: uuid.UUID | None = None) -> NewJob:
    """What a process leaves that dies once the file is written."""
    new = new_job(tenant)
    if job_id is not None:
        new = dataclasses.replace(new, job_id=job_id, image=image(job_id))
    await adverts.uploads.pending.expect(tenant, new.job_id, new.image.path)
    await adverts.assets.write(new.image.path, b"image")
    return new


def test_what_was_cut_short_is_swept_and_nothing_else(run: Callable[[Scenario], None], folder: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        kept = new_job()
        await adverts.create_job(kept, b"image")
        dead = [await cut_short(store, adverts, "a") for _ in range(3)]
        dead.append(await cut_short(store, adverts, "a", kept.job_id))
        unwritten = new_job()
        await adverts.uploads.pending.expect("a", unwritten.job_id, unwritten.image.path)
        stranger = folder / str(uuid.uuid4()) / "a.png"
        stranger.parent.mkdir()
        stranger.write_bytes(b"of another database")
        after_restart = Uploads(store.database, Assets(str(folder)))
        assert await after_restart.sweep(later(GIVEN_UP_S - 60)) == 0, "they may still be under way"
        assert len(files(folder)) == 6
        assert await after_restart.sweep(later(GIVEN_UP_S + 1)) == 5
        assert files(folder) == {kept.image.path, str(stranger.relative_to(folder))}
        assert await status_of(store.jobs.create(dead[0])) == 409, "its file is gone"
        (folder / str(dead[1].job_id)).mkdir()
        (folder / dead[1].image.path).write_bytes(b"a write that hung")
        assert await after_restart.sweep(later(FORGOTTEN_S + 1)) == 0
        stranger.unlink()
        stranger.parent.rmdir()
        await nothing_is_lost(store, folder)

    run(scenario)


def test_deleting_all_takes_what_is_being_uploaded(
    run: Callable[[Scenario], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "AT_ONCE", 8)

    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        for _ in range(3):
            await adverts.create_job(new_job(), b"image")
        for _ in range(20):
            await cut_short(store, adverts, "a")
        other = await cut_short(store, adverts, "b")
        under_way = new_job()
        write = adverts.assets.write
        writing, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(path: str, content: bytes) -> None:
            writing.set()
            await go_on.wait()
            await write(path, content)

        adverts.assets.write = slowly
        uploading = asyncio.ensure_future(adverts.create_job(under_way, b"image"))
        await writing.wait()
        assert await adverts.delete("a", None) == 3
        assert files(folder) == {other.image.path}
        go_on.set()
        assert await status_of(uploading) == 409
        assert files(folder) == {other.image.path}
        assert await rows(store) == set()
        await swept(adverts)
        await nothing_is_lost(store, folder)

    run(scenario)


def test_deleting_a_job_takes_the_overlays_that_are_coming_to_it(run: Callable[[Scenario], None], folder: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        new, stays = new_job(), new_job()
        for each in (new, stays):
            await adverts.create_job(each, b"image")
        coming = await cut_short(store, adverts, "a", new.job_id)
        also = await cut_short(store, adverts, "a", stays.job_id)
        assert await adverts.delete("a", new.job_id) == 1
        assert files(folder) == {stays.image.path, also.image.path}
        assert await status_of(adverts.delete("a", new.job_id)) == 404
        assert await status_of(store.jobs.create(coming)) == 409

    run(scenario)


def test_an_overlay_that_is_refused_in_the_end_has_no_file(run: Callable[[Scenario], None], folder: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        new = new_job()
        await adverts.create_job(new, b"image")
        key = dataclasses.replace(await store.new_job(), job_id=new.job_id, job_variants_id=new.job_variants_id)
        write = adverts.assets.write

        async def meanwhile(path: str, content: bytes) -> None:
            await write(path, content)
            await begin(store, VALIDATE, key)

        adverts.assets.write = meanwhile
        assert await status_of(adverts.record_overlay(key, uuid.uuid4(), image(new.job_id), b"advert", None)) == 409
        assert files(folder) == {new.image.path}

    run(scenario)


@pytest.mark.parametrize(
    ("problem", "entries"),
    [(DureError(503, "x", "x"), 0), (RuntimeError("a bug"), 1), (asyncio.CancelledError(), 1)],
    ids=["refused", "a bug", "cancelled"],
)
def test_a_failure_of_any_kind_leaves_no_file(
    run: Callable[[Scenario], None], folder: Path, problem: BaseException, entries: int
) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        new = new_job()

        async def record() -> None:
            raise problem

        with pytest.raises(type(problem)):
            await adverts.uploads.kept(NewFile("a", new.job_id, new.image.path, b"image"), record)
        await ended(adverts)
        assert files(folder) == set()
        assert len(await rows(store, PendingFile)) == entries
        if entries:
            again = adverts.create_job(new, b"image")
            assert await status_of(again) == 409, "the same call can't have its file back"
        await swept(adverts)
        await nothing_is_lost(store, folder)

    run(scenario)


def test_a_write_that_hangs_is_swept_once_it_has_come(
    run: Callable[[Scenario], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "WAIT_S", 0.1)

    async def scenario(store: Store) -> None:
        adverts, _ = service(store, folder)
        go_on, done = threading.Event(), threading.Event()
        write = adverts.assets._write

        def slowly(at: str, content: bytes) -> None:
            go_on.wait(10)
            write(at, content)
            done.set()

        adverts.assets._write = slowly
        new = new_job()
        with pytest.raises(DureError) as caught:
            await adverts.create_job(new, b"image")
        assert (caught.value.status, caught.value.kind) == (503, "files_unavailable")
        assert await rows(store, PendingFile) == {new.image.path}
        go_on.set()
        await asyncio.to_thread(done.wait, 10)
        assert files(folder) == {new.image.path}
        await adverts.uploads.sweep(later(GIVEN_UP_S + 1))
        assert files(folder) == set()
        await swept(adverts)
        await nothing_is_lost(store, folder)

    run(scenario)
