"""Each test here runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.services.adverts.jobs import Image, Jobs, NewJob
from serve.services.adverts.stages import Stages, VariantKey
from serve.services.adverts.views import Views
from serve.store import migrate
from serve.store.database import Database
from serve.store.outbox import Outbox
from tests.dure import free_port
from tests.postgres import Postgres, binaries, postgres

LEASE_S = 0.6


class Store:
    """All of the store over one database, and a tenant's first job."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.database = Database(url, patience_s=8)
        self.jobs, self.views = Jobs(self.database), Views(self.database)
        self.stages = Stages(self.database, LEASE_S)
        self.outbox = Outbox(self.database, claim_s=0.3)

    async def new_job(self, tenant: str = "a", **more: Any) -> VariantKey:
        new = new_job(tenant, **more)
        made = await self.jobs.create(new)
        return VariantKey(tenant, uuid.UUID(made["job_id"]), uuid.UUID(made["job_variants_id"]))


def image(job_id: uuid.UUID) -> Image:
    asset = uuid.uuid4()
    return Image(asset, f"{job_id}/{asset}.png", "image/png", 4, 4, 99)


def new_job(tenant: str = "a", **more: Any) -> NewJob:
    job_id = uuid.uuid4()
    return NewJob(tenant, job_id, uuid.uuid4(), image(job_id), **{"desc_eng": "A red mug", **more})


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres(free_port()) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'dure.sqlite3'}"
    made: str = request.getfixturevalue("server").database()
    return made


Scenario = Callable[[Store], Coroutine[Any, Any, None]]


@pytest.fixture
def run(url: str) -> Callable[[Scenario], None]:
    migrate.migrate(url)

    def run_scenario(scenario: Scenario) -> None:
        async def main() -> None:
            store = Store(url)
            try:
                await asyncio.wait_for(scenario(store), 30)
            finally:
                await store.database.close()

        asyncio.run(main())

    return run_scenario
