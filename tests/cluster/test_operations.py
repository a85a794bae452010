"""How Dure behaves around its answers: progress, metrics, limits, ids, overload, failures."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import MODELS, ORIGIN
from tests.dure import Dure, wait_until


def shout(client: httpx.Client, *items: dict[str, Any], **options: Any) -> httpx.Response:
    return client.post("/v1/models/shout/run", json={"items": list(items)}, **options)


def events(client: httpx.Client, **parameters: Any) -> list[dict[str, Any]]:
    with client.stream("GET", "/model/upload-stream", params=parameters, timeout=20) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: ")]


def replicas(client: httpx.Client, model: str) -> list[str]:
    """Those that are ready."""
    shown = client.get(f"/v1/models/{model}").json()["replicas"]
    return [replica["replica"] for replica in shown if replica["status"] == "ready"]


def test_progress_stream_shows_every_replica_and_closes(client: httpx.Client) -> None:
    shown = events(client)
    assert {event["model"] for event in shown} == set(MODELS)
    assert all(event["status"] == "ready" and event["progress"] == 100 for event in shown)
    assert set(shown[0]) == {"model", "replica", "status", "progress", "message", "message_ko", "shard", "shards"}
    assert [event["shards"] for event in events(client, model="vision")] == [4]


def test_progress_stream_of_an_unknown_model_is_404(client: httpx.Client) -> None:
    assert client.get("/model/upload-stream", params={"model": "nothing"}).status_code == 404


def test_progress_stream_goes_on_when_told_to_follow(client: httpx.Client) -> None:
    with client.stream("GET", "/model/upload-stream", params={"follow": "true"}, timeout=20) as stream:
        lines = stream.iter_lines()
        assert sum(1 for _, line in zip(2 * MODELS, lines, strict=False) if line.startswith("data: ")) == len(MODELS)
        started = time.monotonic()
        assert next(line for line in lines if line) == ": heartbeat"
        assert time.monotonic() - started < 15


def samples(client: httpx.Client) -> dict[str, list[Any]]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.name not in found, f"{family.name} is there twice"
        found[family.name] = family.samples
    return found


def total(found: dict[str, list[Any]], family: str, sample: str, **labels: str) -> float:
    return sum(
        s.value
        for s in found.get(family, [])
        if s.name == sample and all(s.labels.get(key) == value for key, value in labels.items())
    )


def test_metrics_count_each_prediction_once(client: httpx.Client) -> None:
    before = samples(client)
    for _ in range(5):
        assert client.post("/v1/embeddings", json={"input": ["one", "two"]}).status_code == 200
    time.sleep(2.5)  # replicas report every second
    after = samples(client)

    def grown(family: str, sample: str, **labels: str) -> float:
        return total(after, family, sample, **labels) - total(before, family, sample, **labels)

    assert grown("predictions", "predictions_total", model="embedder", status="ok") == 5
    assert grown("prediction_duration_seconds", "prediction_duration_seconds_count", model="embedder") == 5
    assert grown("dure_batch_items", "dure_batch_items_sum", deployment="embedder") == 10
    assert grown("dure_batch_tokens", "dure_batch_tokens_sum", deployment="embedder") == 30


def test_metrics_show_each_process_once_with_the_buckets_asked_for(client: httpx.Client) -> None:
    found = samples(client)
    replicas = [(s.labels["deployment"], s.labels["replica"]) for s in found["dure_weights_bytes"]]
    assert len(replicas) == len(set(replicas)) == len(MODELS)
    buckets = {float(s.labels["le"]) for s in found["prediction_duration_seconds"] if s.name.endswith("_bucket")}
    assert {0.1, 0.25, 0.5, 0.75, 1, 2.5, 5} <= buckets
    assert {"dure_queue_items", "dure_lane_waiting", "dure_gpu_memory_bytes", "dure_http_requests"} <= set(found)


def test_every_response_has_a_request_id_and_the_log_has_it_too(client: httpx.Client, logs: Path) -> None:
    sent = "order-66.äöü".encode("ascii", "ignore").decode() + "-mine"
    answered = client.get("/v1/models", headers={"X-Request-ID": sent})
    assert answered.headers["x-request-id"] == sent
    ids = {client.get(path).headers["x-request-id"] for path in ("/health", "/health", "/nowhere", "/metrics")}
    assert len(ids) == 4
    assert client.post("/predict", json={"text": 1}, headers={"X-Request-ID": "bad-one"}).headers["x-request-id"] == (
        "bad-one"
    )
    client.get("/x%0aINFO%20forged")
    deadline = time.monotonic() + 10
    while not any(sent in path.read_text(encoding="utf-8") for path in logs.rglob("replica_dure_ingress*")):
        assert time.monotonic() < deadline, "the id is in no log line"
        time.sleep(0.2)
    lines = [
        line for path in logs.rglob("replica_dure_ingress*") for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert not any(line.startswith("INFO forged") for line in lines)


def test_cors_is_for_configured_origins(client: httpx.Client) -> None:
    asked = {"Access-Control-Request-Method": "POST"}
    allowed = client.options("/predict", headers={"Origin": ORIGIN, **asked})
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    stranger = client.options("/predict", headers={"Origin": "https://elsewhere.example.org", **asked})
    assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/predict", 405), ("GET", "/v1/models/nothing", 404)],
)
def test_errors_have_one_shape(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"]
    assert error["message"]


def test_a_body_that_is_no_json_is_told_so(client: httpx.Client) -> None:
    response = client.post("/predict", content=b'{"text": ', headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert "JSON" in response.json()["error"]["message"]


def test_a_body_over_the_limit_is_413(client: httpx.Client) -> None:
    announced = client.post("/predict", json={"text": "x" * 7_000_000})
    assert announced.status_code == 413

    def unannounced() -> Any:
        for _ in range(110):
            yield b"x" * 65_536

    headers = {"Content-Type": "application/json"}
    assert client.post("/predict", content=unannounced(), headers=headers).status_code == 413


def test_a_text_over_the_limit_is_413(client: httpx.Client) -> None:
    for path, body in (("/predict", {"text": "x" * 120_001}), ("/v1/embeddings", {"input": ["x", "x" * 120_001]})):
        response = client.post(path, json=body)
        assert response.status_code == 413, path
        assert "120000" in response.json()["error"]["message"]


def picture(size: tuple[int, int] = (64, 64), kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A valid PNG header that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\x00" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400),
        (b"not an image", 400),
        (picture()[:60], 400),
        (bomb(), 413),
        (picture((6000, 4000)), 413),
        (picture((20_000, 10)), 400),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * (3 * 2**20), 413),
        (picture((1, 1)), 200),
        (picture(mode="CMYK", kind="JPEG"), 200),
        (picture(mode="P"), 200),
        (picture(mode="LA"), 200),
        (picture(mode="I;16"), 200),
        (picture(mode="F", kind="TIFF"), 200),
        (picture(kind="GIF"), 200),
        (picture(kind="WEBP"), 200),
    ],
)
def test_images_are_read_or_refused(client: httpx.Client, content: bytes, status: int) -> None:
    response = client.post("/v1/vision/judge", files={"image": ("a.png", content, "image/png")})
    assert response.status_code == status, response.text
    if status != 200:
        assert response.json()["error"]["param"] == "image"


def test_over_the_queue_is_429_at_once_and_the_admitted_are_answered(client: httpx.Client) -> None:
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: timed(lambda: shout(client, {"say": "x", "wait": 0.5})), range(24)))
    codes = [response.status_code for response, _ in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 8
    for response, seconds in answers:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "queue_full"
            assert seconds < 2
    wait_until(lambda: not any(queue["tickets"] for queue in client.get("/v1/queues").json()["models"]))


def timed(call: Any) -> tuple[httpx.Response, float]:
    started = time.monotonic()
    return call(), time.monotonic() - started


@pytest.mark.parametrize("path", ["/predict", "/v1/embeddings", "/v1/rerank"])
def test_at_least_128_may_wait(client: httpx.Client, path: str) -> None:
    bodies = {
        "/predict": {"text": "오늘 날씨가"},
        "/v1/embeddings": {"input": "hello"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
    }
    limits = httpx.Limits(max_connections=128)
    with httpx.Client(base_url=client.base_url, timeout=60, limits=limits) as many, ThreadPoolExecutor(128) as pool:
        codes = list(pool.map(lambda _: many.post(path, json=bodies[path]).status_code, range(128)))
    assert set(codes) == {200}


def test_a_bad_item_never_fails_its_neighbours(client: httpx.Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        bad = pool.submit(shout, client, {"say": "x", "fail": True})
        good = [pool.submit(shout, client, {"say": "good"}) for _ in range(3)]
        assert [future.result().status_code for future in good] == [200] * 3
        failed = bad.result()
    assert failed.status_code == 500
    assert "tripped" not in failed.text
    assert "Traceback" not in failed.text


def test_memory_that_runs_out_fails_no_request_but_one_that_is_too_large_alone(client: httpx.Client) -> None:
    def ask(memory: int) -> int:
        return shout(client, {"say": "x", "wait": 0.02, "memory": memory}).status_code

    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(ask, [40] * 30 + [101] + [40] * 10))
    assert codes == [200] * 30 + [413] + [200] * 10


def test_over_the_deadline_is_504(client: httpx.Client) -> None:
    response, seconds = timed(lambda: shout(client, {"say": "x", "wait": 5}, headers={"X-Request-Timeout": "2"}))
    assert response.status_code == 504
    assert 1.9 < seconds < 5
    assert shout(client, {"say": "next"}).status_code == 200


def test_only_loopback_is_listened_on(dure: Dure) -> None:
    pids = {process.pid for process in dure.processes()}
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids]
    assert listening
    addresses = {address.ip.removeprefix("::ffff:") for address in listening}
    assert addresses == {"127.0.0.1"}


def test_a_killed_replica_is_replaced_and_requests_go_on(client: httpx.Client, dure: Dure) -> None:
    [before] = replicas(client, "shout")
    [victim] = [
        p for p in dure.processes() if p.name().startswith("ray::ServeReplica") and "shout" in " ".join(p.cmdline())
    ]
    codes: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            codes.append(shout(client, {"say": "x", "wait": 0.05}, timeout=60).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)
    victim.kill()
    wait_until(lambda: before not in replicas(client, "shout") and client.get("/health").is_success)
    over.set()
    thread.join()
    assert codes.count(200) == len(codes), codes


def test_a_replica_whose_engine_is_dead_is_replaced(client: httpx.Client) -> None:
    [before] = replicas(client, "shout")
    for _ in range(3):
        assert shout(client, {"say": "x", "die": True}).status_code == 500
    wait_until(lambda: before not in replicas(client, "shout"))
    assert shout(client, {"say": "again"}, timeout=60).json()["results"][0]["said"] == "AGAIN"


def test_replicas_follow_the_items_that_wait_not_the_calls(client: httpx.Client) -> None:
    over = threading.Event()
    codes: list[int] = []

    def ask() -> None:
        items = [{"say": "x", "wait": 0.1}] * 30
        while not over.is_set():
            codes.append(client.post("/v1/models/growing/run", json={"items": items}).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        wait_until(lambda: len(replicas(client, "growing")) == 2)
    finally:
        over.set()
        thread.join()
    assert set(codes) == {200}


def test_status_and_predict_commands(dure: Dure) -> None:
    table = dure.command("status")
    assert table.returncode == 0
    assert "shout" in table.stdout
    assert "ready" in table.stdout
    words = dure.command("predict", "오늘 날씨가")
    assert words.returncode == 0
    assert "좋아서" in words.stdout
    refused = dure.command("predict", "a" * 120_001)
    assert refused.returncode == 1
    assert "120001 characters" in refused.stderr
