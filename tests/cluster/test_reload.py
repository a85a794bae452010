"""Loading a model anew while it serves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.dure import Dure, wait_until

PATH = "/v1/models/reranker"


def reload(client: httpx.Client, **change: Any) -> httpx.Response:
    return client.post(f"{PATH}/reload", json=change)


def asked(query: str) -> dict[str, Any]:
    return {"query": query, "documents": ["It rains in April.", "It is dry in May."]}


@pytest.fixture(autouse=True)
def as_configured(client: httpx.Client) -> Iterator[None]:
    yield
    assert reload(client, optimized=True, source="demo/rerank/checkpoint").is_success


@contextmanager
def load(client: httpx.Client) -> Iterator[list[int]]:
    """Status codes of what two clients ask of the reranker meanwhile."""
    codes: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.1):  # so that the model gets some of the cores to load
            codes.append(client.post("/v1/rerank", json=asked(f"text {len(codes)}")).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_reload_under_load_fails_no_request_and_is_seen_on_the_stream(client: httpx.Client) -> None:
    shown: list[dict[str, Any]] = []

    def follow() -> None:
        parameters = {"model": "reranker", "follow": "true"}
        with client.stream("GET", "/model/upload-stream", params=parameters, timeout=200) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    shown.append(json.loads(line.removeprefix("data: ")))
                    if "/" in shown[-1]["replica"] and shown[-1]["status"] == "ready":
                        return

    follower = threading.Thread(target=follow)
    follower.start()
    with load(client) as codes:
        assert reload(client, precision="fp32").json()["precision"] == "fp32"
        memory = client.get(PATH).json()["memory_mb"]
        assert reload(client, precision="bf16").json()["precision"] == "bf16"
        assert client.get(PATH).json()["memory_mb"] < 0.6 * memory
    follower.join(30)
    assert set(codes) == {200}
    copy = [event for event in shown if "/" in event["replica"]]
    assert [event["progress"] for event in copy] == sorted(event["progress"] for event in copy)
    assert {"preparing", "loading_checkpoint", "ready"} <= {event["status"] for event in copy}


def test_a_source_that_cannot_be_loaded_leaves_the_old_one_serving(client: httpx.Client) -> None:
    before = client.get(PATH).json()
    refused = reload(client, source="demo/nowhere")
    assert refused.status_code == 400
    assert "there is no folder" in refused.json()["error"]["message"]
    assert client.post("/v1/rerank", json=asked("still here")).is_success
    after = client.get(PATH).json()
    assert (after["source"], after["state"]) == (before["source"], "ready")
    assert [replica["status"] for replica in after["replicas"]] == ["ready", "failed"]


def test_a_reload_holds_for_a_replica_that_starts_later(client: httpx.Client, dure: Dure) -> None:
    assert reload(client, optimized=False).json()["precision"] == "fp32"
    [before] = [replica["replica"] for replica in client.get(PATH).json()["replicas"]]
    [victim] = [
        p for p in dure.processes() if p.name().startswith("ray::ServeReplica") and "reranker" in " ".join(p.cmdline())
    ]
    victim.kill()

    def replaced() -> bool:
        replicas = client.get(PATH).json()["replicas"]
        later = [(each["status"], each["precision"]) for each in replicas if each["replica"] != before]
        return later == [("ready", "fp32")]

    wait_until(replaced)
    wait_until(lambda: len(client.get(PATH).json()["replicas"]) == 1)


def test_a_second_reload_meanwhile_is_refused(client: httpx.Client) -> None:
    assert reload(client, precision="fp32", wait=False).status_code == 202
    refused = reload(client, precision="bf16")
    assert refused.status_code == 409
    assert "under way" in refused.json()["error"]["message"]
    wait_until(lambda: client.get(PATH).json()["precision"] == "fp32")


@pytest.mark.parametrize(
    "change",
    [{}, {"optimized": True, "precision": "fp32"}, {"precision": "fp23"}, {"revision": "main"}, {"sauce": "x"}],
)
def test_a_reload_of_nothing_sensible_is_refused(client: httpx.Client, change: dict[str, Any]) -> None:
    assert reload(client, **change).status_code == 400
    assert client.post("/v1/models/nothing/reload", json={"optimized": True}).status_code == 404
