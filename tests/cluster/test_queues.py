"""Queues as clients see them: places, refusals, tickets, deadlines and events; one search runs here and two wait."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.dure import Dure, wait_until

SEARCH = "/v1/search"
EVENTS = {"Accept": "text/event-stream"}
RUNS, WAITS = 1, 2


def search(documents: int) -> dict[str, Any]:
    """The more documents the longer it takes: each of a hundred tokens, and fresh."""
    stamp = time.monotonic_ns()
    texts = [f"{stamp} {number} " + "the tenant pays a deposit " * 20 for number in range(documents)]
    return {"query": "Who pays?", "documents": texts, "top_k": 1}


LONG, SHORT = 60, 1


@contextmanager
def searching(client: httpx.Client, count: int, **headers: str) -> Iterator[list[Future[httpx.Response]]]:
    """Long searches under way, so many that the lane is as full as asked for."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(client.post, SEARCH, json=search(LONG), headers=headers) for _ in range(count)]


def lane(client: httpx.Client, **headers: str) -> dict[str, Any]:
    lanes = client.get("/v1/queues", headers=headers).raise_for_status().json()["lanes"]
    return next(lane for lane in lanes if lane["name"] == "search")


@pytest.fixture(autouse=True)
def empty_lane(client: httpx.Client) -> None:
    """Nothing runs, waits, or is held for a ticket of an earlier test's."""
    wait_until(lambda: not {lane(client)[each] for each in ("running", "waiting", "tickets")} - {0})


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    for block in response.read().decode().strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            yield lines["event"], json.loads(lines["data"])


def test_queues_show_each_lane_and_model(client: httpx.Client) -> None:
    client.post(SEARCH, json=search(SHORT)).raise_for_status()
    told = client.get("/v1/queues").raise_for_status().json()
    assert {lane["name"] for lane in told["lanes"]} == {
        "search",
        "adverts",
        "likeness",
        "chat",
        "by_openai",
        "by_ollama",
    }
    assert {"predictor", "embedder", "shout"} <= {model["name"] for model in told["models"]}
    known = lane(client)
    assert (known["max_concurrent"], known["max_queue"]) == (RUNS, WAITS)
    assert known["service_time_p50_s"] > 0
    for model in told["models"]:
        assert {"running", "waiting", "rejected", "service_time_p50_s", "estimated_wait_s"} <= set(model)


def test_a_full_lane_refuses_at_once_and_its_ticket_lets_in(client: httpx.Client) -> None:
    rejected = lane(client)["rejected"]
    with searching(client, RUNS + WAITS) as under_way:
        wait_until(lambda: lane(client)["waiting"] == WAITS)
        started = time.monotonic()
        refused = client.post(SEARCH, json=search(SHORT))
        assert time.monotonic() - started < 2
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "queue_full"
        assert lane(client)["rejected"] == rejected + 1
        for _ in range(6):  # its pace is known of shorter ones only
            time.sleep(int(refused.headers["Retry-After"]))
            ticket = {"X-Dure-Ticket": refused.headers["X-Dure-Ticket"]}
            refused = client.post(SEARCH, json=search(SHORT), headers=ticket)
            if refused.is_success:
                break
        assert refused.status_code == 200
        assert [each.result().status_code for each in under_way] == [200] * (RUNS + WAITS)
    wait_until(lambda: (lane(client)["running"], lane(client)["waiting"]) == (0, 0))


def test_another_tenant_is_let_in_where_one_has_filled_the_queue(client: httpx.Client) -> None:
    with searching(client, RUNS + WAITS, **{"X-Tenant-ID": "flood"}) as under_way:
        wait_until(lambda: lane(client, **{"X-Tenant-ID": "flood"})["waiting_of_tenant"] == WAITS)
        assert "flood" not in client.get("/v1/queues").text
        small = client.post(SEARCH, json=search(SHORT), headers={"X-Tenant-ID": "small"})
        assert small.status_code == 200
        assert sorted(each.result().status_code for each in under_way) == [200] * (RUNS + WAITS - 1) + [429]


def test_who_follows_hears_of_place_progress_and_result(client: httpx.Client) -> None:
    asked = search(LONG)
    with searching(client, RUNS + 1):
        wait_until(lambda: lane(client)["waiting"] == 1)
        heard = list(events(client.post(SEARCH, json=asked, headers=EVENTS)))
    names = [name for name, _ in heard]
    assert names == sorted(names, key=["queued", "running", "result"].index)
    places = [data["place"] for name, data in heard if name == "queued"]
    assert places[0] == WAITS
    assert places == sorted(places, reverse=True)
    assert all(data["estimated_wait_s"] > 0 for name, data in heard if name == "queued")
    running = [data for name, data in heard if name == "running" and "done" in data]
    assert "embedding" in {data["doing"] for data in running} <= {"embedding", "ranking"}
    embedded = [data["done"] for data in running if data["doing"] == "embedding"]
    assert embedded == sorted(embedded)
    assert len(set(embedded)) > 2
    assert heard[-1][1]["results"][0]["document"] in asked["documents"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["a", "b"]}),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
        ("/v1/models/shout/run", {"items": [{"say": "a"}]}),
    ],
)
def test_a_followed_call_ends_with_what_the_plain_one_answers(client: httpx.Client, path: str, body: Any) -> None:
    name, data = list(events(client.post(path, json=body, headers=EVENTS)))[-1]
    assert name == "result"
    assert data.keys() == client.post(path, json=body).json().keys()


def test_a_verdict_is_followed_token_by_token(client: httpx.Client) -> None:
    image = Path("demo/adverts/examples/good-advert.png").read_bytes()
    heard = list(events(client.post("/v1/vision/judge", files={"image": image}, headers=EVENTS)))
    tokens = [data["tokens"] for name, data in heard if name == "running" and "tokens" in data]
    assert tokens == sorted(tokens)
    assert tokens
    assert heard[-1][0] == "result"
    assert heard[-1][1]["on_brief"] is True


def test_what_is_refused_from_the_start_is_no_stream(client: httpx.Client) -> None:
    refused = client.post(SEARCH, json={"query": "a", "documents": []}, headers=EVENTS)
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/json"


def test_what_fails_while_it_is_followed_ends_with_an_error(client: httpx.Client) -> None:
    body = {"items": [{"say": "a", "wait": 2}]}
    heard = list(events(client.post("/v1/models/shout/run", json=body, headers=EVENTS | {"X-Request-Timeout": "1"})))
    name, data = heard[-1]
    assert (name, data["status"], data["error"]["type"]) == ("error", 504, "deadline_exceeded")


@pytest.mark.parametrize("header", ["X-Request-Timeout", "x-request-timeout-seconds"])
def test_a_deadline_ends_the_wait_in_the_lane(client: httpx.Client, header: str) -> None:
    with searching(client, RUNS + 1) as under_way:
        wait_until(lambda: lane(client)["waiting"] == 1)
        started = time.monotonic()
        late = client.post(SEARCH, json=search(LONG), headers={header: "0.5"})
        assert late.status_code == 504
        assert late.json()["error"]["type"] == "deadline_exceeded"
        assert time.monotonic() - started < 3
        wait_until(lambda: lane(client)["waiting"] <= 1)
        assert [each.result().status_code for each in under_way] == [200] * (RUNS + 1)


@pytest.mark.parametrize("headers", [{"X-Request-Timeout": "soon"}, {"X-Tenant-ID": "no tenant"}])
def test_headers_that_mean_nothing_are_refused(client: httpx.Client, headers: dict[str, str]) -> None:
    refused = client.post("/predict", json={"text": "a"}, headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == next(iter(headers))


def test_who_leaves_gives_the_place_in_the_queue_back(client: httpx.Client) -> None:
    with searching(client, RUNS + 1):
        wait_until(lambda: lane(client)["waiting"] == 1)
        leaver = EVENTS | {"X-Tenant-ID": "leaver"}
        with client.stream("POST", SEARCH, json=search(LONG), headers=leaver) as response:
            assert b"queued" in next(response.iter_raw())
        wait_until(lambda: lane(client, **leaver)["waiting_of_tenant"] == 0)


def test_admission_may_die_and_nothing_is_lost(client: httpx.Client, dure: Dure) -> None:
    with searching(client, RUNS + WAITS) as under_way:
        wait_until(lambda: lane(client)["waiting"] == WAITS)
        [actor] = [
            process for process in dure.processes() if "Admission" in process.name() + " ".join(process.cmdline())
        ]
        actor.send_signal(signal.SIGKILL)
        assert client.get("/v1/queues").status_code == 200
        assert "dure_lane_running" in client.get("/metrics").text
        assert [each.result().status_code for each in under_way] == [200] * (RUNS + WAITS)
    wait_until(lambda: (lane(client)["running"], lane(client)["waiting"]) == (0, 0))
    assert not psutil.pid_exists(actor.pid)
