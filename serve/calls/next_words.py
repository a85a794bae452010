"""Next words, asked of a model as seldom as possible: not while somebody else asks the same, nor within a minute."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import asdict, dataclass

import orjson

from deployments.messages import Prompt
from serve import errors
from serve.caller import Caller
from serve.calls.cache import Cache
from serve.calls.model import Model
from serve.errors import DureError
from serve.metrics import CACHE

WRITES = 64
"""Answers on their way into the cache at once; more are let go."""
NOTICEABLE_S = 0.05
"""Less time than this is not worth asking again for."""


@dataclass(eq=False)
class Shared:
    """An answer that is being worked out, and how many wait for it."""

    task: asyncio.Task[bytes]
    waiting: int = 0


class Predictions:
    """Answers as JSON: a list of objects with `text`, `append` and `confidence`."""

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache
        self._shared: dict[str, Shared] = {}
        """By key, in which the tenant is: who joins another's has that one's turn, and is refused with it."""
        self._writing: set[asyncio.Task[None]] = set()

    async def of(self, model: Model, prompt: Prompt, caller: Caller) -> bytes:
        """The model's next words. Raises DureError as the model does."""
        try:
            async with asyncio.timeout(caller.left_s()):
                return await self._joined(model, prompt, caller)
        except TimeoutError as error:
            raise errors.too_late(model.name, caller.timeout_s) from error
        except DureError as error:
            if error.kind != errors.LATE or caller.left_s() < NOTICEABLE_S:
                raise
            return await _asked(model, prompt, caller)  # it was the deadline of the one who had asked first

    async def _joined(self, model: Model, prompt: Prompt, caller: Caller) -> bytes:
        """What somebody else is asking already, or what is known, or what the model says."""
        version = model.watch.version(model.name)
        if version is None:  # it is being loaded anew: who answers is not known
            return await _asked(model, prompt, caller)
        key = _key(model.name, version, caller.tenant, prompt)
        shared = self._shared.get(key)
        if shared is None:
            task = asyncio.get_running_loop().create_task(self._find(key, version, model, prompt, caller))
            shared = self._shared[key] = Shared(task)
            task.add_done_callback(lambda _: self._over(key, task))
        else:
            CACHE.labels("joined").inc()
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                self._over(key, shared.task)
                shared.task.cancel()

    def _over(self, key: str, task: asyncio.Task[bytes]) -> None:
        if key in self._shared and self._shared[key].task is task:
            del self._shared[key]

    async def _find(self, key: str, version: str, model: Model, prompt: Prompt, caller: Caller) -> bytes:
        if self.cache is None:
            return await _asked(model, prompt, caller)
        known = await self.cache.get(key)
        CACHE.labels("hit" if known else "miss").inc()
        if known:
            return known
        found = await _asked(model, prompt, caller)
        if model.watch.version(model.name) == version and len(self._writing) < WRITES:
            writing = asyncio.get_running_loop().create_task(self.cache.set(key, found))
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)
        return found


async def _asked(model: Model, prompt: Prompt, caller: Caller) -> bytes:
    [words] = await model.results([prompt], caller, "text")
    return orjson.dumps(words)


def _key(model: str, version: str, tenant: str, prompt: Prompt) -> str:
    """Of all that an answer depends on, and of the tenant: nobody learns from the time it takes what others asked."""
    told = orjson.dumps([model, version, tenant, asdict(prompt)])
    return f"next:{hashlib.sha256(told).hexdigest()}"
