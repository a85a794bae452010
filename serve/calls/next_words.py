"""Next-word predictions, cached; concurrent duplicates share one model call."""

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
"""Most cache writes under way at once; more are dropped."""
NOTICEABLE_S = 0.05
"""With less time left than this, asking again is not worth it."""


@dataclass(eq=False)
class Shared:
    """An answer under way, and how many wait for it."""

    task: asyncio.Task[bytes]
    waiting: int = 0


class Predictions:
    """Answers as JSON: a list of objects with `text`, `append` and `confidence`."""

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache
        self._shared: dict[str, Shared] = {}
        """By key, which includes the tenant: a request that joins another shares its turn, and its refusal."""
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
            return await _predict(model, prompt, caller)  # that was the deadline of the first to ask

    async def _joined(self, model: Model, prompt: Prompt, caller: Caller) -> bytes:
        """The answer of a request under way, else the cache's, else the model's."""
        version = model.watch.version(model.name)
        if version is None:  # it is being reloaded: which version will answer is unknown
            return await _predict(model, prompt, caller)
        key = _key(model.name, version, caller.tenant, prompt)
        shared = self._shared.get(key)
        if shared is None:
            task = asyncio.get_running_loop().create_task(self._find(key, version, model, prompt, caller))
            shared = self._shared[key] = Shared(task)
            task.add_done_callback(lambda _: self._drop(key, task))
        else:
            CACHE.labels("joined").inc()
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                self._drop(key, shared.task)
                shared.task.cancel()

    def _drop(self, key: str, task: asyncio.Task[bytes]) -> None:
        if key in self._shared and self._shared[key].task is task:
            del self._shared[key]

    async def _find(self, key: str, version: str, model: Model, prompt: Prompt, caller: Caller) -> bytes:
        if self.cache is None:
            return await _predict(model, prompt, caller)
        known = await self.cache.get(key)
        CACHE.labels("hit" if known else "miss").inc()
        if known:
            return known
        found = await _predict(model, prompt, caller)
        if model.watch.version(model.name) == version and len(self._writing) < WRITES:
            writing = asyncio.get_running_loop().create_task(self.cache.set(key, found))
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)
        return found


async def _predict(model: Model, prompt: Prompt, caller: Caller) -> bytes:
    [words] = await model.results([prompt], caller, "text")
    return orjson.dumps(words)


def _key(model: str, version: str, tenant: str, prompt: Prompt) -> str:
    """Hash of all that an answer depends on, and of the tenant, so that timing does not reveal what others asked."""
    content = orjson.dumps([model, version, tenant, asdict(prompt)])
    return f"next:{hashlib.sha256(content).hexdigest()}"
