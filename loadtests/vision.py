"""Compares verdicts about images with plain `generate` and with `transformers serve`: `make bench-vision`.

All have the same weights, of LLaVA's form. Dure must follow the schema of a verdict; the others are asked for JSON in
the prompt and write as many tokens as Dure's answers have. Every request has an image of its own.
"""

from __future__ import annotations

import argparse
import base64
import gc
import io
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from deployments.checkpoints.loading import plain_precision
from deployments.engine_loading import load_engine
from deployments.engines.vision import CONVERSATION, Vision
from deployments.load_progress import LoadProgress
from deployments.messages import Answer, Question
from deployments.spec import Precision
from loadtests import servers
from loadtests.llava import SHAPES, SIDE, write_checkpoint
from loadtests.load import texts
from loadtests.report import machine
from serve.config.tasks import model_spec
from serve.services.adverts.verdicts import Validation, validation_prompt

CLIENTS = 8
PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "int4")
SCHEMA = json.dumps(Validation.model_json_schema())
SAMPLE = 8
"""Questions for the engine alone, to learn the tokens and steps of an answer."""
FRESH = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--seconds", type=int, default=40, help="of each measurement of a server")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(os.cpu_count() or 1)
    folder = write_checkpoint(servers.BENCH / f"llava-{options.size}", options.size)
    source = str(folder.relative_to(servers.ROOT))
    print(f"{machine()}; LLaVA's form, {options.size} parameters, random weights")
    tokens = 0
    for precision in PRECISIONS:
        tokens = tokens or _engine(source, precision, SAMPLE) or 0
        if precision != PRECISIONS[0]:
            _engine(source, precision, 1)
    model = {"task": "vision", "source": source, "precision": plain_precision(), "max_batch_items": CLIENTS}
    dure = servers.dure_with("vision", {"vision": model}, {"replicas": 1}, "/v1/vision/")
    peer = _transformers_serve(str(folder))
    plain = Plain(str(folder), tokens)
    rates: dict[str, list[float]] = {"Dure": [], "transformers serve": [], "plain generate": []}
    with dure.running(), peer.running():
        for number in range(options.rounds):
            rates["Dure"].append(_load(lambda client: _ask_dure(client, dure.url), options.seconds))
            rates["plain generate"].append(plain.rate(options.seconds))
            rates["transformers serve"].append(
                _load(lambda client: _ask_transformers(client, peer.url, str(folder), tokens), options.seconds)
            )
            print(f"round {number + 1}: " + ", ".join(f"{name} {each[-1]:.3f}/s" for name, each in rates.items()),
                  flush=True)  # fmt: skip
    for name, found in rates.items():
        ratios = [ours / its for ours, its in zip(rates["Dure"], found, strict=True)]
        print(f"{name}: {statistics.median(found):.3f} images/s; Dure / it {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


def picture() -> bytes:
    """An image that has not been sent before."""
    draw = np.random.default_rng(next(FRESH))
    coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((SIDE, SIDE)).save(out, "JPEG")
    return out.getvalue()


def copy() -> str:
    [text] = texts(1, 6, 16, next(FRESH))
    return text


def _engine(source: str, precision: Precision, questions: int) -> int:
    """Load the engine alone and have it answer. Returns the tokens of an answer."""
    started = time.perf_counter()
    engine = load_engine(model_spec("m", "vision", source, precision=precision), LoadProgress(lambda _: None))
    assert isinstance(engine, Vision)
    loaded_s = time.perf_counter() - started
    asked = [Question(picture(), validation_prompt(copy()), SCHEMA) for _ in range(questions)]
    [first] = engine.run([engine.prepare(asked[0])])
    first_s = time.perf_counter() - started - loaded_s
    answers = [first, *engine.run([engine.prepare(question) for question in asked[1:]])]
    assert all(isinstance(answer, Answer) for answer in answers), answers
    tokens, steps, forced = (
        statistics.mean(getattr(answer, name) for answer in answers) for name in ("tokens", "steps", "forced")
    )
    facts = engine.facts
    fallback = f", {facts.fallback_reason}" if facts.fallback_reason else ""
    print(f"{precision}: weights {facts.weights_bytes / 1e6:.0f} MB, loaded in {loaded_s:.1f} s, first answer after "
          f"{first_s:.1f} s; an answer has {tokens:.0f} tokens, {forced:.0f} of them forced, and takes {steps:.0f} "
          f"steps{fallback}", flush=True)  # fmt: skip
    del engine
    gc.collect()
    return round(tokens)


class Plain:
    """transformers' own `generate`, one request after the other, without a server."""

    def __init__(self, folder: str, tokens: int) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.tokens = tokens

    def rate(self, seconds: float) -> float:
        """Images per second."""
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            self.answer()
            count += 1
        return count / (time.perf_counter() - started)

    @torch.inference_mode()
    def answer(self) -> str:
        image = Image.open(io.BytesIO(picture())).convert("RGB")
        prompt = CONVERSATION.format(prompt=validation_prompt(copy()))
        seen = self.processor(text=prompt, images=image, return_tensors="pt")
        seen["pixel_values"] = seen["pixel_values"].to(self.model.dtype)
        written = self.model.generate(
            **seen, do_sample=False, min_new_tokens=self.tokens, max_new_tokens=self.tokens, pad_token_id=0
        )
        text: str = self.processor.decode(written[0, seen["input_ids"].shape[1] :], skip_special_tokens=True)
        return text


def _transformers_serve(folder: str) -> servers.Server:
    port = servers.free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
    command += ["--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    return servers.Server("transformers serve", "bf16", command, port, "/v1/chat/completions")


def _ask_dure(client: httpx.Client, url: str) -> None:
    answer = client.post(f"{url}validate", data={"ad_copy_text": copy()}, files={"image": picture()})
    Validation.model_validate(answer.raise_for_status().json())


def _ask_transformers(client: httpx.Client, url: str, folder: str, tokens: int) -> None:
    image = "data:image/jpeg;base64," + base64.b64encode(picture()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": validation_prompt(copy())},
    ]
    body = {"model": folder, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}
    answer = client.post(url, json=body).raise_for_status().json()
    used = answer["usage"]["completion_tokens"]
    assert used == tokens, f"transformers serve wrote {used} tokens, not {tokens}"


def _load(ask: Callable[[httpx.Client], Any], seconds: float) -> float:
    """Answers per second to clients that send their next request as soon as they have their answer.

    Requests in flight at the end are waited for, and count with the time that they take.
    """

    def client(until: float) -> Iterator[float]:
        with httpx.Client(timeout=600) as http:
            while time.perf_counter() < until:
                ask(http)
                yield time.perf_counter()

    with httpx.Client(timeout=600) as http:
        ask(http)
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = [pool.submit(lambda: list(client(started + seconds))) for _ in range(CLIENTS)]
        answered = [at for each in done for at in each.result()]
    return len(answered) / (max(answered) - started)


if __name__ == "__main__":
    main()
