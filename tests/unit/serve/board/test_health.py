"""What /health says of models and of services."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI

from deployments.load_progress import LoadEvent
from serve.board.actor import Board
from serve.board.reporter import Reporter
from serve.board.reports import Changes, Replica, Report
from serve.board.watch import TROUBLE, Watch
from serve.routes import health
from serve.services.adverts.service import RUNS, Adverts

READY = LoadEvent("ready", 100.0, "Ready", "준비 완료")
FULL = "image files can't be written: No space left on device"


def answer(watch: Watch) -> httpx.Response:
    app = FastAPI()
    app.include_router(health.router)
    app.state.graph = SimpleNamespace(watch=watch, models={"vision": None}, services={"adverts": None, "search": None})

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://dure") as client:
            return await client.get("/health")

    return asyncio.run(ask())


def watch_of(*replicas: Replica) -> Watch:
    watch = Watch()
    watch.replicas = {(replica.model, replica.replica): replica for replica in replicas}
    return watch


def adverts(name: str, trouble: str) -> Replica:
    return Replica("adverts", name, RUNS, {TROUBLE: trouble})


def test_a_service_in_trouble_is_said_for_as_long_as_it_lasts() -> None:
    vision = Replica("vision", "v", READY)
    assert answer(watch_of(vision)).status_code == 200
    assert answer(watch_of(vision, adverts("a", ""))).json()["status"] == "healthy"
    response = answer(watch_of(vision, adverts("a", ""), adverts("b", FULL)))
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    told: dict[str, Any] = response.json()
    assert (told["status"], told["model_loaded"], told["missing"]) == ("failed", True, ["adverts"])
    assert told["services"] == {"adverts": {"state": "failed", "reason": FULL}}
    assert told["models"]["vision"]["state"] == "ready"


def test_models_that_load_are_said_beside_it() -> None:
    loading = Replica("vision", "v", LoadEvent("loading_checkpoint", 40.0, "Loading", "로드 중"))
    told = answer(watch_of(loading)).json()
    assert (told["status"], told["missing"]) == ("loading", ["vision"])
    assert "services" not in told
    told = answer(watch_of(loading, adverts("a", FULL))).json()
    assert (told["status"], told["model_loaded"], told["missing"]) == ("failed", False, ["vision", "adverts"])


def test_what_a_service_reports_comes_to_health_by_the_board() -> None:
    reporter, board, watch = Reporter(), Board(), Watch()
    reports: list[Report] = []
    reporter.last, reporter._lock = Report("adverts", "r"), threading.Lock()
    reporter.board = SimpleNamespace(report=SimpleNamespace(remote=reports.append))
    service: Any = Adverts.__new__(Adverts)
    service.trouble, service.graph = "", SimpleNamespace(reporter=reporter)
    counts = []
    for trouble in ("", FULL, FULL, ""):
        reports.clear()
        service._report(trouble)
        counts.append(len(reports))
        for report in reports:
            board._take(report, board.replicas and {"r": board.replicas["adverts", "r"]})
        watch._take(Changes(board.epoch, board.sequence, True, list(board.replicas.items())))
        status = answer(watch_of(Replica("vision", "v", READY), *watch.replicas.values())).status_code
        assert status == (503 if trouble else 200)
    assert counts == [0, 2, 0, 2], "what is no news is not told"
