"""An ingress that can't answer any more says so, and Serve puts another in its place."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve.caller import Caller
from serve.calls.graph import Graph
from serve.errors import DureError
from serve.ingress import Ingress
from tests.ingress import make_graph


def listening() -> Graph:
    """A graph that also listens and beats, to nobody."""
    graph = make_graph()
    graph.watch._task = asyncio.ensure_future(asyncio.sleep(60))
    graph.lanes._beating = asyncio.ensure_future(asyncio.sleep(60))
    return graph


def check(graph: Graph) -> None:
    ingress: Any = SimpleNamespace(graph=graph)
    Ingress.check_health(ingress)


def test_an_ingress_whose_parts_work_is_healthy() -> None:
    async def scenario() -> None:
        check(listening())

    asyncio.run(scenario())


def test_a_queue_that_nothing_leaves_any_more_is_no_health(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        graph = listening()
        model = graph.models["embedder"]

        def fail() -> Any:
            raise RuntimeError("a bug")

        monkeypatch.setattr(model.coalescer, "_take", fail)
        with pytest.raises(DureError):
            await model.ask(["a"], Caller.waiting(0.1))
        with pytest.raises(RuntimeError, match="coalescer of embedder"):
            check(graph)

    asyncio.run(scenario())


@pytest.mark.parametrize("part", ["watch", "lanes"])
def test_an_ingress_that_hears_or_tells_nothing_is_not_healthy(part: str) -> None:
    async def scenario() -> None:
        graph = listening()
        task = graph.watch._task if part == "watch" else graph.lanes._beating
        assert task
        task.cancel()
        await asyncio.wait((task,))
        with pytest.raises(RuntimeError, match=part):
            check(graph)

    asyncio.run(scenario())
