"""One cluster for all tests here: the models of configs/local.yaml and an engine of a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.dure import ROOT, Dure, config_file, free_port
from tests.hook import Hook, hook_on

ORIGIN = "https://app.example.org"
MAX_CONNECTIONS = 12
PRIVATE = ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "10.0.0.1"]
"""Allowed, so that only their addresses stand in the way."""
MODELS = ["predictor", "vision", "embedder", "reranker", "chat", "by_openai", "by_ollama", "shout", "growing"]
"""That are loaded at the start; `sleeper` is not."""


@pytest.fixture(scope="session")
def hook() -> Iterator[Hook]:
    with hook_on(free_port()) as running:
        yield running


@pytest.fixture(scope="session")
def dure(tmp_path_factory: pytest.TempPathFactory, hook: Hook) -> Iterator[Dure]:
    folder = tmp_path_factory.mktemp("dure")
    (folder / "seconds_per_shard").write_text("0.01", encoding="utf-8")
    shipped = yaml.safe_load((ROOT / "configs/local.yaml").read_text(encoding="utf-8"))
    models = shipped["applications"][0]["args"]["models"]
    for name in ("predictor", "embedder", "chat"):
        models[name]["precision"] = "fp32"  # as fast on one machine as on another, and nothing to measure at the start
    shout = {"task": "tests.engines:Shout", "source": str(folder)}
    models["shout"] = {**shout, "max_queue": 8, "max_batch_items": 4}
    models["growing"] = {
        **shout,
        "max_batch_items": 1,
        "autoscaling": {
            "max_replicas": 2,
            "target_ongoing_requests": 4,
            "look_back_period_s": 2,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 1,
        },
    }
    models["sleeper"] = {
        **shout,
        "autoscaling": {
            "min_replicas": 0,
            "max_replicas": 2,
            "look_back_period_s": 2,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 1,
            "policy": "tests.engines:pairs",
        },
    }
    port = free_port()
    for kind in ("openai", "ollama"):  # the server is its own upstream
        upstream = {"kind": kind, "url": f"http://127.0.0.1:{port}", "model": "chat"}
        models[f"by_{kind}"] = {"task": "chat", "upstream": upstream}
    config = config_file(
        folder,
        models,
        port,
        ingress={"cors_origins": [ORIGIN]},
        limits={"max_body_mb": 6, "max_image_mb": 2, "max_text_chars": 120_000, "max_image_megapixels": 20},
        websocket={"max_connections": MAX_CONNECTIONS},
        adverts={"lease_s": 3},
        search={"max_concurrent": 1, "max_queue": 2},
        services={
            "likeness": {
                "service": "tests.own_service:Likeness",
                "needs": ["embedding"],
                "routes": ["tests.own_service"],
                "options": {"digits": 3},
            }
        },
        webhook={"url": hook.url, "secret": hook.secret, "first_retry_s": 0.2, "max_attempts": 3},
        fetch={"hosts": ["images.example.org", *PRIVATE]},
        request_timeout_s=200,
    )
    running = Dure(config, folder / "state", port)
    try:
        yield running.wait_ready()
    finally:
        running.kill()


@pytest.fixture(scope="session")
def client(dure: Dure) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=dure.url, timeout=210) as http:
        yield http


@pytest.fixture(scope="session")
def logs(dure: Dure) -> Path:
    return dure.state.parent / "logs"
