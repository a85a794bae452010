"""LLaVA's real shape on a GPU, with random weights: `python -m loadtests.gpu.vision --size 7b`.

Measures memory, the time for one verdict, verdicts per second with 16 at once, and how much of the memory bandwidth
decoding uses. It first writes a checkpoint of the size (14 GB for 7b), and needs no hub and no server.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deployments.checkpoints.loading import device
from deployments.engine_loading import load_engine
from deployments.engines.vision import Look, Vision
from deployments.load_progress import LoadProgress
from deployments.messages import Answer, Question
from deployments.spec import Precision
from loadtests.llava import SHAPES, write_checkpoint
from loadtests.report import machine
from loadtests.servers import BENCH
from loadtests.vision import SCHEMA, copy, picture
from serve.config.tasks import model_spec
from serve.services.adverts.verdicts import validation_prompt

AT_ONCE = 16
LONE = 5
SPEED_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="7b")
    parser.add_argument("--precisions", default="fp16,int8", help="of fp16, bf16, int8 and int4")
    parser.add_argument("--folder", type=Path, default=BENCH)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else machine()
    print(f"{where}; torch {torch.__version__}; LLaVA 1.5's form, {options.size}, random weights", flush=True)
    folder = write_checkpoint(options.folder / f"llava-{options.size}", options.size, device().type)
    bandwidth = _bandwidth()
    print(f"memory is copied at {bandwidth / 1e9:.0f} GB/s", flush=True)
    for precision in options.precisions.split(","):
        _measure(folder, precision, bandwidth)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _measure(folder: Path, precision: Precision, bandwidth: float) -> None:
    started = time.perf_counter()
    spec = model_spec("m", "vision", str(folder), precision=precision, prefix_cache_mb=0)
    engine = load_engine(spec, LoadProgress(lambda _: None))
    assert isinstance(engine, Vision)
    engine.warm_up()
    loaded_s = time.perf_counter() - started
    lone = [_timed(lambda: _answers(engine, 1)) for _ in range(LONE)]
    elapsed_s, answers = _timed(lambda: _answers(engine, AT_ONCE))
    step_s = _decoding_step_s(engine)
    facts = engine.facts
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    tokens = statistics.mean(answer.tokens for answer in answers)
    forced = statistics.mean(answer.forced for answer in answers)
    print(f"{facts.precision}{' (' + facts.fallback_reason + ')' if facts.fallback_reason else ''}: weights "
          f"{facts.weights_bytes / 1e9:.1f} GB, at most {peak / 1e9:.1f} GB in use; ready after {loaded_s:.0f} s\n"
          f"  one image: p50 {statistics.median(seconds for seconds, _ in lone):.2f} s\n"
          f"  {AT_ONCE} at once: {AT_ONCE / elapsed_s:.2f} images/s; an answer has {tokens:.0f} tokens, {forced:.0f} "
          f"of them forced\n"
          f"  a decoding step of one answer: {1000 * step_s:.1f} ms, "
          f"{facts.weights_bytes / step_s / bandwidth:.0%} of the copy rate", flush=True)  # fmt: skip


def _answers(engine: Vision, count: int) -> list[Answer]:
    asked = [Question(picture(), validation_prompt(copy()), SCHEMA) for _ in range(count)]
    answers = engine.run([engine.prepare(question) for question in asked])
    assert all(isinstance(answer, Answer) for answer in answers), answers
    return answers


def _decoding_step_s(engine: Vision) -> float:
    """Seconds per step of one answer: the median without the first step."""
    look = Look(engine.prepare(Question(picture(), validation_prompt(copy()), SCHEMA)))
    times = []
    while look.result is None:
        times.append(_timed(lambda: engine.step([look]))[0])
    return statistics.median(times[1:])


def _bandwidth() -> float:
    """Bytes copied per second."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    target.copy_(source)
    times: list[float] = []
    while sum(times) < SPEED_S:
        times.append(_timed(lambda: target.copy_(source))[0])
    return source.nbytes / statistics.median(times)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that the call takes, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
