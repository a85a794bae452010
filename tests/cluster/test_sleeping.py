"""A model without requests has no replica. The first request waits for one, and is shown that the model loads."""

from __future__ import annotations

import threading
from typing import Any

import httpx

from tests.cluster.test_queues import EVENTS, events
from tests.dure import wait_until

RUN = "/v1/models/sleeper/run"


def sleeper(client: httpx.Client) -> dict[str, Any]:
    model: dict[str, Any] = client.get("/v1/models/sleeper").raise_for_status().json()
    return model


def ready(client: httpx.Client) -> int:
    return sum(replica["status"] == "ready" for replica in sleeper(client)["replicas"])


def test_the_first_request_waits_and_sees_it_load(client: httpx.Client) -> None:
    wait_until(lambda: sleeper(client)["state"] == "asleep")
    assert client.get("/health").json()["models"]["sleeper"]["state"] == "asleep"
    received = list(events(client.post(RUN, json={"items": [{"say": "good morning"}]}, headers=EVENTS)))
    assert received[-1][1]["results"] == [{"said": "GOOD MORNING", "batch": 1}]
    loaded = [data["loaded"] for name, data in received if name == "queued" and data.get("doing") == "loading"]
    assert loaded
    assert loaded == sorted(loaded)
    wait_until(lambda: sleeper(client)["state"] == "asleep")


def test_a_custom_policy_decides_the_number_of_replicas(client: httpx.Client) -> None:
    codes: set[int] = set()
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            codes.add(client.post(RUN, json={"items": [{"say": "a", "wait": 1}]}).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_until(lambda: ready(client) == 2)
    finally:
        enough.set()
        asking.join()
    assert codes == {200}
    wait_until(lambda: sleeper(client)["state"] == "asleep")
