"""A disk that is full, for real: images are refused and leave nothing, deleting works, and all is well afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from serve.errors import DureError
from serve.services.adverts.janitor import LONGEST_POLL_S
from serve.services.adverts.stages import VALIDATE
from serve.services.adverts.uploads import GIVEN_UP_S, Uploads
from serve.store import migrate
from serve.store.assets import LEAST_ROOM_BYTES, Assets
from serve.store.tables import PendingFile
from tests.dure import wait_until
from tests.store.conftest import Scenario, Store, image, new_job
from tests.store.test_service import service
from tests.store.test_stages import begin
from tests.store.test_uploads import ended, files, later, rows

DISK_BYTES = 4 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take up all the room that is left."""
    filler = disk / f"filler-{uuid.uuid4()}"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    assert shutil.disk_usage(disk).free == 0
    return filler


async def until_refused(adverts: Any) -> None:
    """What SQLite's log still has room for is taken."""
    while True:
        await adverts.create_job(new_job(), b"image")


def with_store(url: str, scenario: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        migrate.migrate(url)
        store = Store(url)
        try:
            await asyncio.wait_for(scenario(store), 60)
        finally:
            await store.database.close()

    asyncio.run(main())


async def refused(call: Any) -> DureError:
    with pytest.raises(DureError) as caught:
        await call
    error = caught.value
    assert (error.status, error.kind) == (503, "files_unavailable"), error
    assert int(error.headers["Retry-After"]) >= 1
    return error


def test_on_a_full_disk_images_are_refused_and_leave_nothing(run: Callable[[Scenario], None], disk: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, disk / "assets")
        first = new_job()
        await adverts.create_job(first, os.urandom(200_000))
        key = await store.new_job()
        before = await rows(store)
        assert await adverts.assets.problem() == ""
        filler = fill(disk)
        for size in (9, 5000, 300_000):
            assert "full" in (await refused(adverts.create_job(new_job(), os.urandom(size)))).message
            await refused(adverts.record_overlay(key, uuid.uuid4(), image(key.job_id), os.urandom(size), None))
        assert adverts.uploads.troubled.is_set()
        await ended(adverts)
        assert files(disk / "assets") == {first.image.path}
        assert [path.name for path in (disk / "assets").iterdir()] == [str(first.job_id)]
        assert await rows(store) == before
        assert await rows(store, PendingFile) == set()
        assert await adverts.assets.problem() == "image files can't be written: No space left on device"
        filler.unlink()
        assert await adverts.assets.problem() == ""
        await adverts.create_job(new_job(), os.urandom(200_000))

    run(scenario)


def test_a_disk_that_lacks_room_for_the_last_image_is_full(disk: Path) -> None:
    async def scenario() -> None:
        assets = Assets(str(disk))
        await refused(assets.write("a/b.png", bytes(DISK_BYTES + 1)))
        await assets.discard("a/b.png")
        assert "No space" in await assets.problem(), "there is some room, but not for such an image"
        await assets.write("a/c.png", bytes(1000))
        assert files(disk) == {"a/c.png"}, "nothing stays of looking"

    asyncio.run(scenario())


def test_a_full_disk_is_reported_for_as_long_as_it_lasts(disk: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, disk / "assets")
        reported: list[str] = [""]
        changed = asyncio.Event()

        def report(trouble: str) -> None:
            if trouble != reported[-1]:
                reported.append(trouble)
                changed.set()

        adverts.janitor.report = report
        adverts.janitor.start()
        await adverts.create_job(new_job(), b"image")
        await asyncio.to_thread(wait_until, (disk / "dure.sqlite3-reserve").exists, 10)  # room is held from the start
        filler = fill(disk)
        await refused(adverts.create_job(new_job(), b"image"))
        await asyncio.wait_for(changed.wait(), 1)
        changed.clear()
        filler.unlink()
        await asyncio.wait_for(changed.wait(), LONGEST_POLL_S + 1)
        assert reported == ["", "image files can't be written: No space left on device", ""]

    with_store(f"sqlite:///{disk / 'dure.sqlite3'}", scenario)


def test_uploads_at_once_that_fill_the_disk_leave_what_is_on_record(disk: Path) -> None:
    async def scenario(store: Store) -> None:
        adverts, _ = service(store, disk / "assets")
        await store.database.hold_room()
        calls = [adverts.create_job(new_job(), os.urandom(60_000)) for _ in range(160)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        made = {answer["image_asset_id"] for answer in answers if isinstance(answer, dict)}
        assert 5 < len(made) < 155
        kinds = {(each.status, each.kind) for each in answers if isinstance(each, DureError)}
        assert kinds == {(503, "files_unavailable")}, kinds
        assert len(made) + sum(isinstance(each, DureError) for each in answers) == 160
        await ended(adverts)
        assert files(disk / "assets") == await rows(store)
        assert {Path(path).stem for path in files(disk / "assets")} == made
        assert (disk / "dure.sqlite3-reserve").exists(), "it is for deleting"
        assert await adverts.delete("a", None) == len(made)
        assert files(disk / "assets") == set()
        await adverts.uploads.sweep(later(GIVEN_UP_S + 1))
        await adverts.create_job(new_job(), os.urandom(60_000))

    with_store(f"sqlite:///{disk / 'dure.sqlite3'}", scenario)


@pytest.mark.parametrize("empty_log", [True, False], ids=["its log is empty", "its log is long"])
def test_deleting_works_where_the_records_disk_is_full(disk: Path, tmp_path: Path, empty_log: bool) -> None:
    """The images are elsewhere, so deleting them makes no room for the record."""

    async def scenario(store: Store) -> None:
        adverts, _ = service(store, tmp_path / "assets")
        await store.database.hold_room()
        made = [uuid.UUID((await adverts.create_job(new_job(), b"image"))["job_id"]) for _ in range(20)]
        key = await store.new_job("b")
        assert await store.database.problem() == ""
        if empty_log:
            with contextlib.closing(sqlite3.connect(disk / "dure.sqlite3")) as plain:
                plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        filler = fill(disk)
        assert await store.database.problem() == "the record can't be written: No space left on device"
        await refused(until_refused(adverts))
        await refused(begin(store, VALIDATE, key))
        await ended(adverts)
        for job_id in made:  # each takes some of SQLite's log
            assert await adverts.delete("a", job_id) == 1
        await adverts.delete("a", None)
        assert files(tmp_path / "assets") == set()
        assert len(await rows(store)) == 1, "the other tenant's"
        filler.unlink()
        await adverts.create_job(new_job(), b"image")
        await begin(store, VALIDATE, key)
        await store.database.hold_room()
        assert (disk / "dure.sqlite3-reserve").exists(), "room is held anew"

    with_store(f"sqlite:///{disk / 'dure.sqlite3'}", scenario)


def test_a_record_on_a_full_disk_is_opened_and_read(disk: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{disk / 'dure.sqlite3'}"

    async def before(store: Store) -> None:
        await store.database.hold_room()
        await store.new_job()

    async def after(store: Store) -> None:
        adverts, _ = service(store, tmp_path / "assets")
        assert await adverts.delete("a", None) == 1

    with_store(url, before)
    fill(disk)
    migrate.make_ready(url)
    with_store(url, after)


class Full(LocalFileSystem):  # type: ignore[misc]
    """Files as on a disk that fills up while they are written."""

    protocol = "full"
    code = errno.ENOSPC

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        super().pipe_file(path, value[: len(value) // 2])
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT])
def test_whatever_fails_to_be_written_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(Full, "code", code)
    fsspec.register_implementation("full", Full, clobber=True)

    async def scenario(store: Store) -> None:
        adverts, _ = service(store, tmp_path / "assets")
        adverts.assets.files = Full()
        error = await refused(adverts.create_job(new_job(), b"image"))
        assert ("full" in error.message) == (code in (errno.ENOSPC, errno.EDQUOT))
        assert list((tmp_path / "assets").iterdir()) == []
        assert await rows(store) == set()

    with_store(f"sqlite:///{tmp_path / 'dure.sqlite3'}", scenario)


def test_files_elsewhere_are_looked_for_only_where_something_failed() -> None:
    class Away(fsspec.AbstractFileSystem):  # type: ignore[misc]
        asked = 0
        answers = False

        def info(self, path: str, **_: Any) -> Any:
            self.asked += 1
            raise FileNotFoundError if self.answers else ConnectionError("no route with a secret in it")

        pipe_file = cat_file = info

        def makedirs(self, *_: Any, **__: Any) -> None: ...

    async def scenario() -> None:
        assets = Assets("memory://assets")
        assets.is_local, assets.files = False, Away(skip_instance_cache=True)
        assert (await assets.problem(), assets.files.asked) == ("", 0)
        with pytest.raises(DureError) as caught:
            await assets.read("a/b.png")
        assert caught.value.status == 503
        assert await assets.problem() == "image files can't be written: ConnectionError"
        assets.files.answers = True
        assert await assets.problem() == ""
        assert (await assets.problem(), assets.files.asked) == ("", 3)

    asyncio.run(scenario())


def test_little_room_is_none(disk: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{disk / 'dure.sqlite3'}"

    async def scenario(store: Store) -> None:
        filler = fill(disk)
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - LEAST_ROOM_BYTES // 2)
        await store.database.hold_room()
        assert not (disk / "dure.sqlite3-reserve").exists()
        assert await store.database.problem()
        assert await Uploads(store.database, Assets(str(disk / "assets"))).assets.problem()

    with_store(url, scenario)
