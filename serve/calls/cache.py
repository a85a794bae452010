"""Keeps answers for a minute: in this process, or in Redis for all processes.

A cache may forget at any time, and holds nothing that a model could not compute again. So nothing here raises: a failed
read counts as a miss, and a failed write is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from cachetools import TTLCache
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MaxConnectionsError, RedisError, ResponseError

from serve.config.settings import CacheSettings
from serve.metrics import CACHE

logger = logging.getLogger("ray.serve")

ENTRY_BYTES = 250
"""Overhead of an entry beyond its key and value: the objects that hold them and a place in the dictionary."""
REST_S = 1.0
"""A Redis that failed is left alone for this long, so that only the first request waits for it to time out."""
CONNECTIONS = 64
PREFIX = "dure:"


class Cache(Protocol):
    async def get(self, key: str) -> bytes | None:
        """The value; None if it was never stored or has been dropped."""

    async def set(self, key: str, value: bytes) -> None:
        """Store the value until it expires."""


def cache_of(settings: CacheSettings) -> Cache | None:
    """The cache that the config asks for; None if it is switched off."""
    if not settings.ttl_s:
        return None
    if settings.url.startswith("memory:"):
        return MemoryCache(settings.ttl_s, int(settings.max_mb * 2**20))
    return RedisCache(settings.url, settings.ttl_s, settings.timeout_s)


class MemoryCache:
    """Holds up to `max_bytes`; entries that were not read for longest go first."""

    def __init__(self, ttl_s: float, max_bytes: int) -> None:
        self._entries: TTLCache[str, tuple[str, bytes]] = TTLCache(max_bytes, ttl_s, time.monotonic, _size)
        """Keys beside the values, as both count."""

    async def get(self, key: str) -> bytes | None:
        _, value = self._entries.get(key, (key, None))
        return value

    async def set(self, key: str, value: bytes) -> None:
        self._entries.pop(key, None)
        with contextlib.suppress(ValueError):  # it is larger than the cache
            self._entries[key] = key, value

    @property
    def nbytes(self) -> int:
        self._entries.expire()
        return int(self._entries.currsize)


class RedisCache:
    """A Redis that may be slow, full or gone. Then every read is a miss, and it is tried again a second later.

    A value is stored behind its key's hash, which is compared when it comes back. So an answer that got onto the wrong
    connection, or was written by somebody else, is ignored.
    """

    def __init__(self, url: str, ttl_s: float, timeout_s: float) -> None:
        self.ttl_ms = max(1, int(ttl_s * 1000))
        self.rests_until = 0.0
        self.redis: Redis = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            max_connections=CONNECTIONS,
            retry=Retry(NoBackoff(), 0),
        )

    async def get(self, key: str) -> bytes | None:
        kept = await self._ask(lambda: self.redis.get(PREFIX + key))
        seal = _seal(key)
        return kept[len(seal) :] if isinstance(kept, bytes) and kept.startswith(seal) else None

    async def set(self, key: str, value: bytes) -> None:
        await self._ask(lambda: self.redis.set(PREFIX + key, _seal(key) + value, px=self.ttl_ms))

    async def _ask(self, command: Callable[[], Awaitable[object]]) -> object:
        if time.monotonic() < self.rests_until:
            return None
        # Shielded: a command that is cancelled half-way would leave its answer on the connection for the next one.
        return await asyncio.shield(self._answer(command))

    async def _answer(self, command: Callable[[], Awaitable[object]]) -> object:
        try:
            return await command()
        except MaxConnectionsError:  # a rush of requests; Redis may be well
            pass
        except ResponseError as error:  # Redis works but refuses this: its memory is full
            CACHE.labels("error").inc()
            logger.warning("Redis refused a command: %s", error)
        except (RedisError, OSError, TimeoutError) as error:
            CACHE.labels("error").inc()
            logger.warning("Redis can't be used; trying again in %g s: %r", REST_S, error)
            self.rests_until = time.monotonic() + REST_S
        return None


def _size(entry: tuple[str, bytes]) -> int:
    key, value = entry
    return len(key) + len(value) + ENTRY_BYTES


def _seal(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
