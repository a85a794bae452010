"""Memory of a server with a shipped config, process by process: `make bench-memory`.

It is measured as PSS, the proportional set size: a process's own memory, plus its part of what it shares with others.
The sum over all processes is what would be free without them. It is taken right after the start, and again after some
load on every model, which fills buffers and caches.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from loadtests import servers
from loadtests.load import texts
from loadtests.report import machine

TARGET_MB = 2700
"""Most that all processes together should take."""
LOAD_S = 30
"""Seconds of load between the two measurements."""
CLIENTS = 4
"""Clients per endpoint."""
IMAGE = servers.ROOT / "demo/adverts/examples/red-mug.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=servers.ROOT / "configs/local.yaml")
    parser.add_argument("--seconds", type=int, default=LOAD_S)
    options = parser.parse_args()
    document = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    server = servers.dure_from(document, "memory", "/predict")
    with server.running() as process:
        print(f"{machine()}: {options.config.name}, all processes of the server, PSS in MB")
        time.sleep(3)
        started = by_process(process.pid)
        asyncio.run(load(f"http://127.0.0.1:{server.port}", options.seconds))
        time.sleep(3)
        used = by_process(process.pid)
    print(f"{'process':<44}{'started':>9}{'used':>9}")
    for name in sorted(used, key=lambda name: -used[name]):
        print(f"{name:<44}{started.get(name, 0):>9.0f}{used[name]:>9.0f}")
    print(f"{'all':<44}{sum(started.values()):>9.0f}{sum(used.values()):>9.0f}   target: at most {TARGET_MB}")


def by_process(root: int) -> dict[str, float]:
    """MB of the server's process and of each that it has started. Processes with the same name are numbered."""
    found: dict[str, float] = {}
    for process in servers.processes(root):
        try:
            name, pss = _name(process), process.memory_full_info().pss / 2**20
        except psutil.Error:
            continue
        number = sum(known.startswith(f"{name} #") or known == name for known in found)
        found[f"{name} #{number + 1}" if number else name] = pss
    return found


def _name(process: psutil.Process) -> str:
    """What the process is for, as far as its command line says."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0]
    known = [Path(word).name for word in words if not word.startswith("-")]
    return " ".join(known[:3])[:40]


async def load(url: str, seconds: float) -> None:
    """Have a few clients send requests to every model, with fresh texts of mixed length."""
    draw, until = random.Random(1), time.monotonic() + seconds
    words = texts(4000, 2, 120, 1)

    async def post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> None:
        async with session.post(url + path, json=body) as response:
            await response.read()

    async def client(session: aiohttp.ClientSession, path: str) -> None:
        while time.monotonic() < until:
            some = draw.sample(words, 16)
            if path == "/v1/vision/judge":
                form = aiohttp.FormData()
                form.add_field("image", IMAGE.read_bytes(), filename="image.png")
                async with session.post(url + path, data=form) as response:
                    await response.read()
            elif path == "/predict":
                await post(session, path, {"text": some[0][:60]})
            elif path == "/v1/embeddings":
                await post(session, path, {"input": some})
            else:
                await post(session, path, {"query": some[0][:60], "documents": some})

    paths = ("/predict", "/v1/embeddings", "/v1/rerank", "/v1/search", "/v1/vision/judge")
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session, path) for path in paths for _ in range(CLIENTS)))


if __name__ == "__main__":
    main()
