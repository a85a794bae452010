"""Caches, one of them a real Redis that is stopped, filled up and held still."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve.calls import cache as cache_module
from serve.calls.cache import CONNECTIONS, MemoryCache, RedisCache, cache_of
from serve.config.settings import CacheSettings
from tests.dure import free_port, wait_until


@dataclass
class Server:
    """A Redis that can be stopped and started again."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self.folder]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: self.ask("PING") == "PONG")

    def stop(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, *command: str) -> str:
        told = ["redis-cli", "-p", str(self.port), *command]
        return subprocess.run(
            told, capture_output=True, text=True, timeout=10, check=False, encoding="utf-8"
        ).stdout.strip()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    running = Server(tmp_path)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def redis(server: Server, ttl_s: float = 60, timeout_s: float = 5) -> RedisCache:
    cache = cache_of(CacheSettings(url=f"redis://127.0.0.1:{server.port}/0", ttl_s=ttl_s, timeout_s=timeout_s))
    assert isinstance(cache, RedisCache)
    return cache


def test_memory_keeps_what_it_was_given_for_its_time() -> None:
    async def scenario() -> None:
        cache = MemoryCache(0.2, 10_000)
        await cache.set("a", b"1")
        await cache.set("a", b"2")
        assert await cache.get("a") == b"2"
        assert await cache.get("b") is None
        await asyncio.sleep(0.25)
        assert await cache.get("a") is None
        await cache.set("b", b"3")
        assert cache.nbytes < 500, "what has run out takes no room"

    run(scenario())


def test_memory_holds_no_more_than_it_may() -> None:
    async def scenario() -> None:
        cache = MemoryCache(60, 10_000)
        for number in range(1000):
            await cache.set(f"key {number}", b"x" * (number % 300))
            assert cache.nbytes <= 10_000
        assert await cache.get("key 999") is not None
        assert await cache.get("key 0") is None
        await cache.set("large", b"x" * 20_000)
        assert await cache.get("large") is None

    run(scenario())


def test_no_cache_where_nothing_is_kept() -> None:
    assert cache_of(CacheSettings(ttl_s=0)) is None


def test_redis_keeps_what_it_was_given_for_its_time(server: Server) -> None:
    async def scenario() -> None:
        cache = redis(server, ttl_s=1.5)
        await cache.set("a", "값".encode())
        assert await cache.get("a") == "값".encode()
        assert await redis(server).get("a") == "값".encode(), "another process has it too"
        assert await cache.get("b") is None
        await asyncio.sleep(1.6)
        assert await cache.get("a") is None

    run(scenario())


def test_a_rush_is_no_failure(server: Server) -> None:
    async def scenario() -> None:
        cache = redis(server)
        await cache.set("a", b"1")
        found = await asyncio.gather(*(cache.get("a") for _ in range(500)))
        assert set(found) <= {None, b"1"}
        assert found.count(b"1") >= CONNECTIONS
        assert await cache.get("a") == b"1"

    run(scenario())


def test_what_somebody_else_wrote_is_no_answer(server: Server) -> None:
    async def scenario() -> None:
        cache = redis(server)
        server.ask("SET", "dure:a", "something else")
        assert await cache.get("a") is None
        server.ask("RPUSH", "dure:list", "1")
        assert await cache.get("list") is None
        await cache.set("b", b"1")
        server.ask("RENAME", "dure:b", "dure:c")
        assert await cache.get("c") is None

    run(scenario())


def test_a_redis_that_goes_and_comes_back_loses_nothing_but_time(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_module, "REST_S", 0.2)
    wrong: list[Any] = []
    asked = 0

    async def client(cache: RedisCache, number: int, over: asyncio.Event) -> None:
        nonlocal asked
        while not over.is_set():
            asked += 1
            key = f"key {number} {asked % 50}"
            await cache.set(key, key.encode())
            found = await cache.get(key)
            if found not in (None, key.encode()):
                wrong.append((key, found))
            await asyncio.sleep(0)

    async def scenario() -> None:
        cache, over = redis(server), asyncio.Event()
        clients = [asyncio.create_task(client(cache, number, over)) for number in range(20)]
        for _ in range(3):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.stop)
            before = asked
            await asyncio.sleep(0.5)
            assert asked > before, "it goes on without"
            await asyncio.to_thread(server.start)
        for _ in range(50):
            await cache.set("after", b"1")
            if await cache.get("after") == b"1":
                break
            await asyncio.sleep(0.1)
        assert await cache.get("after") == b"1", "it is used again"
        over.set()
        await asyncio.gather(*clients)

    run(scenario())
    assert not wrong


def test_a_redis_that_hangs_is_waited_for_once(server: Server) -> None:
    async def scenario() -> None:
        await redis(server).set("a", b"1")
        cache = redis(server, timeout_s=0.5)
        assert server.process
        server.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        for _ in range(20):
            assert await cache.get("a") is None
        assert time.monotonic() - started < 20 * 0.5 / 2
        server.process.send_signal(signal.SIGCONT)
        for _ in range(50):
            if await cache.get("a") == b"1":
                return
            await asyncio.sleep(0.1)
        raise AssertionError("it is not used again")

    run(scenario())


def test_a_full_redis_still_answers(server: Server) -> None:
    async def scenario() -> None:
        cache = redis(server)
        await cache.set("a", b"1")
        server.ask("CONFIG", "SET", "maxmemory", "1")
        await cache.set("b", b"2")
        assert await cache.get("b") is None
        assert await cache.get("a") == b"1"

    run(scenario())


def test_clients_that_leave_in_the_middle_leave_no_answer_to_others(server: Server) -> None:
    async def scenario() -> None:
        cache = redis(server)
        for number in range(100):
            await cache.set(f"k{number}", f"v{number}".encode())
        for number in range(100):
            leaving = asyncio.create_task(cache.get(f"k{number}"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            leaving.cancel()
            assert await cache.get(f"k{99 - number}") == f"v{99 - number}".encode()

    run(scenario())
