"""A day's traffic on a running Dure: `make loadtest ARGS="--shape spike --users 40"`.

The users are people who type, search or have adverts checked, programs that index documents, and one that watches.
`loadtests/shapes.py` has their number over time; `--users` is a day's peak. Inputs are fresh, although many sentences
begin alike. At the end a line is printed for each endpoint, and every job that was made is deleted.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from typing import Any

import gevent
import httpx
from locust import LoadTestShape, between, constant, events, task
from locust.env import Environment
from pydantic import BaseModel

from loadtests.fresh import DRAW, case, copy, form, sentence
from loadtests.shapes import SHAPES, people
from loadtests.typing_socket import TypingSocket
from loadtests.visitor import TRIES, Visitor, table
from serve.services.adverts.verdicts import Judgement, Validation

TENANT = "loadtest"
RUN_S = 120
ENDS_S = 30.0
"""People may finish what they are doing within this long after the end, and it counts."""
ALL_AT_ONCE = 100.0
"""People per second: high enough that the shape alone decides how fast they come."""
KEY_S, DEBOUNCE_S = 0.2, 0.3
"""Average time between two letters, and from the last letter until the text is sent."""
WORDS, FOUND = 5, 3
"""Next words and documents to ask for."""


class Typist(Visitor):
    """Types sentences letter by letter and waits for the next words at each pause."""

    weight = 5
    wait_time = between(1, 5)

    def on_start(self) -> None:
        self.socket = TypingSocket(self.host, self.environment.events.request.fire)

    def on_stop(self) -> None:
        self.socket.close()

    @task(4)
    def type_along(self) -> None:
        text = sentence()
        for end in range(1, len(text) + 1):
            pause_s = DRAW.expovariate(1 / KEY_S)
            gevent.sleep(min(pause_s, DEBOUNCE_S))
            if pause_s > DEBOUNCE_S or end == len(text):
                self.socket.ask(text[:end], lambda answer: are_words(answer["data"]))

    @task(1)
    def predict(self) -> None:
        words = sentence().split()
        begun = " ".join(words[: DRAW.randint(1, len(words))])
        self.ask("POST", "/predict", lambda answer: are_words(answer["predictions"]), json={"text": begun})


class Searcher(Visitor):
    """Looks for the documents that answer a question."""

    weight = 3
    wait_time = between(1, 4)

    @task(3)
    def search(self) -> None:
        self._find("/v1/search", "top_k", "score", DRAW.randint(8, 32))

    @task(2)
    def rerank(self) -> None:
        self._find("/v1/rerank", "top_n", "relevance_score", DRAW.randint(4, 16))

    @task(2)
    def embed(self) -> None:
        embed(self, case(1).query)

    @task(1)
    def follow(self) -> None:
        asked = case(DRAW.randint(8, 32))
        body = {"query": asked.query, "documents": asked.documents, "top_k": FOUND}
        events = {"Accept": "text/event-stream"}
        self.ask("POST", "/v1/search", ends_well, name="/v1/search (followed)", json=body, headers=events)

    def _find(self, path: str, limit: str, score: str, size: int) -> None:
        asked = case(size)
        body = {"query": asked.query, "documents": asked.documents, limit: FOUND}
        self.ask("POST", path, lambda answer: are_hits(answer["results"], score, size), json=body)


class Indexer(Visitor):
    """A program with many documents to embed."""

    weight = 1
    wait_time = between(2, 6)

    @task
    def embed(self) -> None:
        embed(self, list(case(DRAW.randint(8, 64)).documents))


class Advertiser(Visitor):
    """Has adverts checked: mostly with single requests, sometimes as a job on record."""

    weight = 1
    wait_time = between(2, 6)

    @task(2)
    def validate(self) -> None:
        self._verdict("/v1/vision/validate", Validation, **form("red-mug", ad_copy_text=copy()))

    @task(2)
    def judge(self) -> None:
        self._verdict("/v1/vision/judge", Judgement, **form("good-advert"))

    @task(1)
    def story(self) -> None:
        """Make a job, run stage 1, upload the finished advert, run stage 2, read the job, delete it."""
        sent = form("red-mug", tenant_id=TENANT, desc_eng=copy())
        made = self.ask("POST", "/api/yh/jobs", lambda answer: {"job_id", "job_variants_id"} <= answer.keys(), **sent)
        if made is None:
            return
        self.wait()
        self._stages(made["job_id"], made["job_variants_id"])
        job, name = f"/api/yh/jobs/{made['job_id']}", "/api/yh/jobs/{id}"
        tenant = {"tenant_id": TENANT}
        self.ask("GET", job, lambda answer: len(answer["variants"]) == 1, name=name, params=tenant)
        self.ask("DELETE", job, lambda answer: answer == {"deleted": 1}, name=name, params=tenant)

    def _stages(self, job_id: str, variant_id: str) -> None:
        ids = {"tenant_id": TENANT, "job_id": job_id, "job_variants_id": variant_id}
        if self._verdict("/api/yh/llava/stage1/validate", Validation, json=ids) is None:
            return
        self.wait()
        named = "/api/yh/jobs/{}/variants/{}/overlay"
        overlay, name = named.format(job_id, variant_id), named.format("{id}", "{id}")
        finished = form("good-advert", tenant_id=TENANT)
        if self.ask("POST", overlay, lambda answer: "overlay_id" in answer, name=name, **finished) is not None:
            self._verdict("/api/yh/llava/stage2/judge", Judgement, json=ids)

    def _verdict(self, path: str, shape: type[BaseModel], **content: Any) -> Any:
        def right(answer: dict[str, Any]) -> bool:
            verdict = {name: answer[name] for name in answer.keys() - {"job_id", "vlm_trace_id"}}
            return bool(shape.model_validate(verdict))

        return self.ask("POST", path, right, **content)


class Monitor(Visitor):
    """Watches the server."""

    fixed_count = 1
    wait_time = constant(5)

    @task
    def look(self) -> None:
        self.ask("GET", "/health", lambda answer: answer["status"] == "healthy")
        self.ask("GET", "/health/live", bool)
        listed = self.ask(
            "GET", "/v1/models", lambda answer: all(each["id"] and each["state"] for each in answer["data"])
        )
        for model in listed["data"] if listed else ():
            self.ask("GET", f"/v1/models/{model['id']}", lambda answer: "replicas" in answer, name="/v1/models/{name}")
        self.ask("GET", "/v1/queues", lambda answer: answer["lanes"] and answer["models"])
        self.ask("GET", "/model/upload-stream", lambda told: '"status":"failed"' not in told)
        self.ask("GET", "/metrics", lambda answer: "# TYPE predictions_total " in answer)


class Traffic(LoadTestShape):
    """The chosen shape, stretched over `--run-time`."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        elapsed = self.get_run_time() / (options.run_time or RUN_S)
        return None if elapsed > 1 else (people(options.shape, options.num_users, elapsed), ALL_AT_ONCE)


@events.init_command_line_parser.add_listener
def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="day", help="how the number of people changes")
    parser.set_defaults(stop_timeout=ENDS_S, host=os.environ.get("DURE_URL", "http://127.0.0.1:8000"))


@events.init.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    try:
        httpx.get(f"{environment.host}/health", timeout=30).raise_for_status()
    except httpx.HTTPError as error:
        sys.exit(f"{environment.host} is not ready ({error}); start it with `make serve`")
    print(f"{options.shape} of {options.run_time or RUN_S} s on {environment.host}, {options.num_users} people at the "
          f"peak of a day", flush=True)  # fmt: skip


@events.test_stop.add_listener
def _delete_jobs(environment: Environment, **_: Any) -> None:
    """Delete jobs until none is left: some may still have been in progress when their advertisers stopped."""
    if Advertiser not in environment.user_classes:
        return
    with httpx.Client(base_url=environment.host, timeout=60) as client:
        for _ in range(TRIES):
            response = client.delete("/api/yh/jobs", params={"tenant_id": TENANT})
            if response.is_success and response.json() == {"deleted": 0}:
                return
            time.sleep(float(response.headers.get("Retry-After", 1)))
    raise RuntimeError(f"jobs of tenant {TENANT} are left: {response.text}")


@events.quitting.add_listener
def _end(environment: Environment, **_: Any) -> None:
    print(f"\n{table(environment.stats)}\n")
    for error in environment.stats.errors.values():
        print(f"failed {error.occurrences} times: {error.to_name()}")
    if report := environment.parsed_options.html_file:
        print(f"Over time: {report}", flush=True)


def embed(visitor: Visitor, given: str | list[str]) -> None:
    """Embed one text, or a list, which has a line of its own in the table."""
    is_list = isinstance(given, list)
    count = len(given) if is_list else 1

    def right(answer: dict[str, Any]) -> bool:
        indexes = [entry["index"] for entry in answer["data"]]
        sizes = {len(entry["embedding"]) for entry in answer["data"]}
        return indexes == list(range(count)) and len(sizes) == 1 and min(sizes) > 1

    name = "/v1/embeddings (lists)" if is_list else "/v1/embeddings"
    visitor.ask("POST", "/v1/embeddings", right, name=name, json={"input": given})


def are_words(found: list[dict[str, Any]]) -> bool:
    """At least one and at most WORDS words, best first, no duplicates."""
    confidences = [word["confidence"] for word in found]
    texts = {word["text"] for word in found if isinstance(word["append"], str)}
    return 0 < len(texts) == len(found) <= WORDS and confidences == sorted(confidences, reverse=True)


def are_hits(found: list[dict[str, Any]], score: str, documents: int) -> bool:
    """As many hits as were asked for, best first, no duplicates."""
    scores = [hit[score] for hit in found]
    indexes = {hit["index"] for hit in found}
    return len(indexes) == len(found) == min(FOUND, documents) and scores == sorted(scores, reverse=True)


def ends_well(told: str) -> bool:
    """The last of the progress events is the result, or a refusal because a model's queue is full."""
    last = told.rstrip().split("\n\n")[-1]
    refused = '"status":429' in last or '"status":503' in last
    return last.startswith("event: result") or (last.startswith("event: error") and refused)
