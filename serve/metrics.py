"""Metrics of the ingress, and one exposition of the metrics of all processes in the cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from deployments.metrics import SECONDS

REGISTRY = CollectorRegistry()

PREDICTIONS = Counter("predictions", "Model and service calls answered", ["model", "status"], registry=REGISTRY)
DURATION = Histogram(
    "prediction_duration_seconds",
    "Time from a request's arrival in a route to its answer",
    ["model"],
    registry=REGISTRY,
    buckets=SECONDS,
)
QUEUE_ITEMS = Gauge("dure_queue_items", "Items waiting or running for a model", ["name"], registry=REGISTRY)
REJECTED = Counter("dure_rejected", "Requests refused because a queue was full", ["name"], registry=REGISTRY)
CACHE = Counter(
    "dure_cache_lookups",
    "Lookups of predictions: hit, miss, joined (the same call was under way), error (Redis failed)",
    ["result"],
    registry=REGISTRY,
)
CONNECTIONS = Gauge("dure_websocket_connections", "Clients connected over WebSocket", registry=REGISTRY)
NODE_LOAD = Gauge(
    "dure_node_load", "Fraction in use on a process's machine: cpu, memory, gpu_memory", ["of"], registry=REGISTRY
)
REQUESTS = Counter("dure_http_requests", "HTTP responses", ["method", "route", "status"], registry=REGISTRY)


@contextmanager
def measured(model: str) -> Iterator[None]:
    """Counts and times one prediction: status `ok`, `refused` (4xx, 429 among them), `cancelled` or `error`."""
    from serve.errors import DureError

    started = time.perf_counter()
    status = "error"
    try:
        yield
        status = "ok"
    except asyncio.CancelledError:
        status = "cancelled"
        raise
    except DureError as error:
        status = "refused" if error.status < 500 else "error"
        raise
    finally:
        DURATION.labels(model).observe(time.perf_counter() - started)
        PREDICTIONS.labels(model, status).inc()


def of_lanes(standings: dict[str, dict[str, Any]]) -> list[Metric]:
    """Metrics of each lane in the cluster: requests running, requests waiting, and the wait of a new request."""
    families = {
        "running": GaugeMetricFamily("dure_lane_running", "Requests running, per service", labels=["name"]),
        "waiting": GaugeMetricFamily("dure_lane_waiting", "Requests waiting, per service", labels=["name"]),
        "estimated_wait_s": GaugeMetricFamily(
            "dure_lane_wait_seconds", "Estimated wait of a new request, per service", labels=["name"]
        ),
    }
    for name, standing in standings.items():
        for field, family in families.items():
            family.add_metric([name], standing[field])
    return list(families.values())


class Cluster:
    """A collector that merges the metric families of many processes by name; each process's samples appear once."""

    def __init__(self, processes: dict[tuple[str, str], Iterable[Metric]]) -> None:
        self.processes = processes

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for (deployment, replica), families in self.processes.items():
            for family in families:
                into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    if sample.name.endswith("_created"):
                        continue
                    labels = {**sample.labels, "deployment": deployment, "replica": replica}
                    into.samples.append(sample._replace(labels=labels))
        yield from merged.values()


def exposition(processes: dict[tuple[str, str], Any]) -> bytes:
    """All processes' metrics in Prometheus text format 0.0.4, each sample labelled with its deployment and replica."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Cluster(processes))
    return generate_latest(registry)
