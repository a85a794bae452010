"""Calling a deployment: a bound on what waits for it, a deadline, and errors that a client can act on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.spec import Refusal
from serve import errors
from serve.errors import DureError
from serve.metrics import QUEUE_ITEMS, REJECTED
from serve.watch import Watch

TRIES = 3
"""A call whose replica died is made again on another; every call that models and services take is free of effects."""
RETRY_PAUSE_S = 0.2
MAX_RETRY_AFTER_S = 60.0


class Gate:
    """Counts what waits for a deployment in this process, in items, and measures how fast it goes."""

    def __init__(self, name: str, max_items: int) -> None:
        self.name = name
        self.max_items = max_items
        self.items = 0
        self.seconds_per_item = 0.05
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def admitted(self, items: int, patience_s: float = 0) -> AsyncIterator[None]:
        """Raises a 429 where the queue is full and stays so for `patience_s`.

        A list gets in whole while there is room for one item, so that long lists don't starve behind short ones.
        """
        deadline = time.monotonic() + patience_s
        while self.items >= self.max_items:
            left = deadline - time.monotonic()
            if left <= 0:
                REJECTED.labels(self.name).inc()
                raise errors.queue_full(self.name, self.items, self.retry_after_s())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), left)
        self.items += items
        QUEUE_ITEMS.labels(self.name).set(self.items)
        ahead, started = self.items, time.monotonic()
        try:
            yield
            measured = (time.monotonic() - started) / ahead
            self.seconds_per_item += 0.1 * (measured - self.seconds_per_item)
        finally:
            self.items -= items
            QUEUE_ITEMS.labels(self.name).set(self.items)
            self._freed.set()
            self._freed = asyncio.Event()

    def retry_after_s(self) -> float:
        """When what waits now will have been answered, at the pace measured lately."""
        return min(MAX_RETRY_AFTER_S, self.items * self.seconds_per_item)


class Deployment:
    """A deployment that this process calls; where `patient`, a full queue is waited for instead of refused."""

    def __init__(self, name: str, handle: DeploymentHandle, max_queue: int, patient: bool = False) -> None:
        self.name = name
        self.handle = handle
        self.gate = Gate(name, max_queue)
        self.patient = patient

    async def call(self, *arguments: Any, items: int, timeout_s: float) -> Any:
        """Call `run` within the deadline. Raises DureError for everything that can go wrong."""
        deadline = time.monotonic() + timeout_s
        async with self.gate.admitted(items, timeout_s if self.patient else 0):
            return await self._call(arguments, deadline, timeout_s)

    async def _call(self, arguments: tuple[Any, ...], deadline: float, timeout_s: float) -> Any:
        for attempt in range(1, TRIES + 1):
            response = self.handle.run.remote(*arguments)
            try:
                return await asyncio.wait_for(_result(response), max(0.001, deadline - time.monotonic()))
            except TimeoutError as error:
                response.cancel()
                raise errors.too_late(self.name, timeout_s) from error
            except RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, DureError) else errors.internal() from error
            except BackPressureError as error:
                raise errors.queue_full(self.name, self.gate.items, self.gate.retry_after_s()) from error
            except (RayActorError, DeploymentUnavailableError) as error:
                if attempt == TRIES:
                    raise errors.unavailable(self.name) from error
                await asyncio.sleep(RETRY_PAUSE_S)
        raise AssertionError("unreachable")


class Model(Deployment):
    """A model's deployment, which may still be loading."""

    def __init__(
        self,
        name: str,
        task: str,
        handle: DeploymentHandle,
        max_queue: int,
        patient: bool,
        watch: Watch,
        load_wait_s: float,
    ) -> None:
        super().__init__(name, handle, max_queue, patient)
        self.task = task
        self.watch = watch
        self.load_wait_s = load_wait_s

    async def ask(self, requests: list[Any], timeout_s: float) -> list[Any]:
        """One result per request, or a Refusal in its place."""
        results: list[Any] = await self.call(requests, items=len(requests), timeout_s=timeout_s)
        return results

    async def results(self, requests: list[Any], timeout_s: float, param: str) -> list[Any]:
        """One result per request. Raises DureError for the first that was refused; `param` is the list's field."""
        results = await self.ask(requests, timeout_s)
        for number, result in enumerate(results):
            if isinstance(result, Refusal):
                raise refused(result, f"{param}.{number}" if len(results) > 1 else param)
        return results

    async def _call(self, arguments: tuple[Any, ...], deadline: float, timeout_s: float) -> Any:
        state = await self.watch.settled(self.name, min(self.load_wait_s, deadline - time.monotonic()))
        if state == "failed":
            raise errors.failed(self.name, self.watch.reason(self.name))
        if state == "loading":
            raise errors.loading(self.name, 5)
        return await super()._call(arguments, deadline, timeout_s)


def refused(refusal: Refusal, param: str) -> DureError:
    param = refusal.field or param
    if refusal.kind == "too_large":
        return errors.too_large(refusal.reason, param)
    if refusal.kind == "failed":
        return DureError(500, "model_failed", refusal.reason, param)
    return errors.invalid(refusal.reason, param)


async def _result(response: Any) -> Any:
    return await response
