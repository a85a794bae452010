"""Compares next words with the algorithm that Dure replaces, and with the machine's limits: `make bench-predict`.

Dure is asked over HTTP, with its cache off. The other algorithm runs in this process, one request after the other and
without a server, which is the fastest it can be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from deployments.engine_loading import load_engine
from deployments.engines.predictor import Predictor
from deployments.load_progress import LoadProgress
from deployments.messages import Prompt
from deployments.spec import Precision
from loadtests import servers
from loadtests.check import WrongAnswers
from loadtests.load import Measure, Workload, load
from loadtests.next_word import write_checkpoint
from loadtests.peers.full_passes import FullPasses
from loadtests.report import Report, Result, machine
from serve.config.tasks import model_spec

FOLDER = servers.BENCH / "next-word"
PRECISION: Precision = "bf16"
DURE: dict[str, Any] = {
    "task": "next_word",
    "source": str(FOLDER.relative_to(servers.ROOT)),
    "precision": PRECISION,
    "max_queue": 4096,
}
TRIED = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEER_PROMPTS = 4
"""Prompts per round; each takes seconds."""
CHECKED = 16
SAME_BEST_WORD = 0.8
"""Smallest share of prompts with the same best word. With random weights, probabilities of words are close, and bf16
rounds differently in batches of other shapes."""
SPEED_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed: apt-get install wrk")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(os.cpu_count() or 1)
    words = write_checkpoint(FOLDER)
    lengths = {"short": ("prompts of 8 to 24 tokens", 4, 12), "long": ("prompts of 100 to 128 tokens", 50, 64)}
    workloads = [
        Workload(f"{length}-{clients}", f"{clients} clients, {title}", clients, 1, shortest, longest, words)
        for length, (title, shortest, longest) in lengths.items()
        for clients in (1, 32)
    ]
    report = Report(
        "predict",
        "Next words",
        "GPT-2 of KoGPT2's size (vocabulary 51,200, 35 % of it begin words), random weights; top 5, whole words.",
        options.seconds,
        options.rounds,
    )
    peer, dtype = _fastest(workloads[0])
    server = servers.dure_with(
        "predict", {"predictor": DURE}, {"replicas": 1}, "/predict", more={"cache": {"ttl_s": 0}}
    )
    with server.running():
        report.took_part("Dure", servers.versions(server) | {"precision": PRECISION, "cache": "off"})
        report.took_part("full passes", {"precision": dtype, "threads": str(torch.get_num_threads())})
        try:
            _check(server, peer, workloads)
        except WrongAnswers as error:
            sys.exit(str(error))
        for number in range(options.rounds):
            for workload in workloads:
                found = load(server.url, json.dumps({"text": "TEXT"}), workload, options.seconds)
                report.add(workload, Result("Dure", PRECISION, found))
                report.add(workload, Result("full passes", dtype, _one_by_one(peer, workload, number)))
    report.finish()
    del peer
    spec = model_spec("m", "next_word", DURE["source"], precision=PRECISION)
    engine = load_engine(spec, LoadProgress(lambda event: None))
    assert isinstance(engine, Predictor)
    _limits(engine, workloads)
    _typed_on(engine, workloads)


def _fastest(workload: Workload) -> tuple[FullPasses, str]:
    """The replaced algorithm in the precision that is faster here."""
    spent: dict[str, float] = {}
    for name, dtype in TRIED.items():
        peer = FullPasses(FOLDER, dtype)
        spent[name] = _timed(lambda peer=peer: _one_by_one(peer, workload, 99))  # type: ignore[misc]
    best = min(spent, key=spent.__getitem__)
    return FullPasses(FOLDER, TRIED[best]), best


def _one_by_one(peer: FullPasses, workload: Workload, seed: int) -> Measure:
    times = [_timed(lambda text=text: peer.predict(text)) for text in workload.texts(PEER_PROMPTS, seed)]  # type: ignore[misc]
    rate = len(times) / sum(times)
    # A lone client is answered at once. With many, each waits for all the others.
    return Measure(rate, rate, 1000 * statistics.median(times) * workload.clients)


def _check(server: servers.Server, peer: FullPasses, workloads: list[Workload]) -> None:
    """Raises WrongAnswers if Dure, asked for all prompts at once, predicts other words than full passes."""
    prompts = [text for workload in workloads for text in workload.texts(CHECKED // len(workloads), 7)]
    answers = asyncio.run(_ask(server, prompts))
    same = [answer[0]["text"] == peer.predict(text)[0][0] for text, answer in zip(prompts, answers, strict=True)]
    print(f"The best word is the same as with full passes for {sum(same)} of {len(same)} prompts", flush=True)
    if sum(same) < SAME_BEST_WORD * len(same):
        raise WrongAnswers(f"Dure predicts other words: the same best one for {sum(same)} of {len(same)} prompts")


async def _ask(server: servers.Server, prompts: list[str]) -> list[list[dict[str, Any]]]:
    async with httpx.AsyncClient(timeout=120) as client:
        answers = await asyncio.gather(*(client.post(server.url, json={"text": text}) for text in prompts))
    return [answer.raise_for_status().json()["predictions"] for answer in answers]


@dataclass
class Pass:
    """One step of the engine."""

    seconds: float
    read: int
    """Tokens that went through the layers."""
    judged: int
    """Tokens for which the probabilities of the next one were computed."""


def _limits(engine: Predictor, workloads: list[Workload]) -> None:
    """Print how far the engine's steps are from what memory and arithmetic allow."""
    head = engine.model.get_output_embeddings().weight
    layers = sum(each.numel() for each in engine.model.base_model.h.parameters())
    bandwidth, rate = _bandwidth(), _matrix_rate(head.dtype)
    print(f"\n{machine()}: memory is copied at {bandwidth / 1e9:.1f} GB/s, {PRECISION} matrices are multiplied at "
          f"{rate / 1e9:.0f} billion operations/s")  # fmt: skip
    for workload in workloads:
        passes: list[Pass] = []
        with _watched(engine, passes):
            for number in range(1 + 8 // workload.clients):
                items = [engine.prepare(Prompt(text)) for text in workload.texts(workload.clients, number)]
                if number == 0:
                    engine.run(items)
                    passes.clear()
                engine.run(items)
        seconds = sum(each.seconds for each in passes)
        limits = [
            max(
                (layers + head.numel()) * head.element_size() / bandwidth,
                2 * (each.read * layers + each.judged * head.numel()) / rate,
            )
            for each in passes
        ]
        tokens = sum(each.read for each in passes)
        print(f"{workload.title}: {tokens / seconds:.0f} tokens/s, {1000 * seconds / len(passes):.1f} ms per step, "
              f"{seconds / sum(limits):.2f} times the limit of {1000 * sum(limits) / len(passes):.1f} ms")  # fmt: skip


def _typed_on(engine: Predictor, workloads: list[Workload]) -> None:
    """Print the gain if a prompt extends one that was read before by a word."""
    for workload in workloads:
        fresh: list[float] = []
        further: list[float] = []
        for number in range(1 + 8 // workload.clients):
            texts = [text.rsplit(" ", 1) for text in workload.texts(workload.clients, 100 + number)]
            before = [engine.prepare(Prompt(begun)) for begun, _ in texts]
            after = [engine.prepare(Prompt(" ".join(text))) for text in texts]
            engine.prefixes.clear()
            fresh.append(_timed(lambda after=after: _stepped(engine, after)))  # type: ignore[misc]
            engine.prefixes.clear()
            _stepped(engine, before)
            further.append(_timed(lambda after=after: _stepped(engine, after)))  # type: ignore[misc]
        ratio = statistics.median(fresh) / statistics.median(further)
        print(f"{workload.title}: read anew {1000 * statistics.median(fresh):.0f} ms, typed on by a word "
              f"{1000 * statistics.median(further):.0f} ms, {ratio:.2f} times as fast")  # fmt: skip


def _stepped(engine: Predictor, items: list[Any]) -> None:
    """Run the items step by step, as a replica does; `run` would not use the prefix cache."""
    works = [engine.begin(item) for item in items]
    while left := [work for work in works if work.result is None]:
        engine.step(left)


@contextmanager
def _watched(engine: Predictor, passes: list[Pass]) -> Any:
    step = engine.step

    def watched(works: list[Any]) -> None:
        read = sum(work.cost for work in works)
        judged = sum(len(work.growing) or 1 for work in works)
        passes.append(Pass(_timed(lambda: step(works)), read, judged))

    engine.step = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.step = step  # type: ignore[method-assign]


def _bandwidth() -> float:
    """Bytes copied per second."""
    source = torch.zeros(2**27, dtype=torch.uint8)
    target = torch.empty_like(source)
    return source.nbytes / _median_s(lambda: target.copy_(source))


def _matrix_rate(dtype: torch.dtype) -> float:
    """Operations per second for the larger matrices of a layer, with many tokens."""
    tokens, weights = torch.randn(1024, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    return 2 * tokens.numel() * len(weights) / _median_s(lambda: torch.nn.functional.linear(tokens, weights))


def _median_s(call: Callable[[], Any]) -> float:
    call()
    times: list[float] = []
    while sum(times) < SPEED_S:
        times.append(_timed(call))
    return statistics.median(times)


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
