"""Calls to a model, which may still be loading, and the items that wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.messages import Answers, Piece, Refusal, Requests, turns
from serve import errors
from serve.board.watch import Watch
from serve.caller import Caller
from serve.calls.coalescer import Coalescer
from serve.calls.deployment import LOST, RETRY_PAUSE_S, Deployment
from serve.config.model import ModelSettings
from serve.errors import DureError
from serve.progress import Following, Progress, telling
from serve.waiting import end

DIED = Refusal("the model's process died twice while it worked on this; send something smaller", "failed")


class Model(Deployment):
    """A model's deployment, which may still be loading, and the items that wait for it."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        handle: DeploymentHandle,
        patient: bool,
        watch: Watch,
        load_wait_s: float,
        weights: Mapping[str, float],
    ) -> None:
        super().__init__(name, handle, settings.max_queue, patient, weights)
        self.task = settings.task
        self.takes_token_ids = settings.token_ids
        self.watch = watch
        self.load_wait_s = load_wait_s
        self.coalescer = Coalescer(
            self._send,
            lambda: settings.max_batch_items * watch.parallel(name),
            lambda: watch.ready(name),
            lambda: watch.in_steps(name),
            self.gate.tickets.pace,
        )
        self.gate.running = lambda: self.coalescer.under_way

    async def ask(self, requests: list[Any], caller: Caller, following: Following | None = None) -> Answers:
        """A result or a Refusal per request. Raises DureError for everything else that can go wrong."""
        most = self.watch.max_tokens(self.name)
        work = [turns(request, most) for request in requests]
        async with self.gate.admitted(sum(work), caller.left_s() if self.patient else 0, caller, len(requests)):
            try:
                if self.watch.state(self.name) == "ready":
                    return await self._ask(requests, work, caller, following)
                async with telling(following, self._loading) if following else contextlib.nullcontext():
                    return await self._ask_when_loaded(requests, work, caller, following)
            except TimeoutError as error:
                raise errors.too_late(self.name, caller.timeout_s) from error

    async def _ask(self, requests: list[Any], work: list[int], caller: Caller, following: Following | None) -> Answers:
        weight = self.gate.weights.get(caller.tenant, 1.0)
        return await self.coalescer.ask(requests, caller.left_s(), following, caller.tenant, weight, work)

    async def _ask_when_loaded(
        self, requests: list[Any], work: list[int], caller: Caller, following: Following | None
    ) -> Answers:
        if self.watch.state(self.name) != "asleep":
            await self._loaded(min(self.load_wait_s, caller.left_s()))
            return await self._ask(requests, work, caller, following)
        # Serve starts a replica once a call waits for one, so the call is made at once.
        asking = asyncio.ensure_future(self._ask(requests, work, caller, following))
        loaded = asyncio.ensure_future(self._loaded(caller.left_s()))
        try:
            await asyncio.wait((asking, loaded), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                loaded.result()
            return await asking
        finally:
            await end(asking, loaded)

    async def _loaded(self, timeout_s: float) -> None:
        """Wait for the model. Raises DureError if it has failed or is not loaded in time."""
        state = await self.watch.settled(self.name, timeout_s)
        if state == "failed":
            raise errors.failed(self.name, self.watch.reason(self.name))
        if state != "ready":
            raise errors.loading(self.name, 5)

    async def _loading(self, following: Following) -> None:
        while self.watch.state(self.name) != "ready":
            following.tell(Progress("queued", doing="loading", loaded=self.watch.progress(self.name)))
            await self.watch.changed()

    async def results(self, requests: list[Any], caller: Caller, param: str, following: Following | None = None) -> Any:
        """One result per request, in a list or a dataclass of arrays; `following` receives progress meanwhile.

        Raises DureError for the first request that was refused; `param` is the field that holds the requests.
        """
        answers = await self.ask(requests, caller, following)
        if answers.refusals:
            number = min(answers.refusals)
            raise refused(answers.refusals[number], f"{param}.{number}" if len(requests) > 1 else param)
        return answers.results

    async def _send(self, requests: Requests, deliver: Callable[[Piece], None]) -> None:
        """Have a replica answer requests.

        If it dies, each unanswered request is repeated once, alone and one after the other, so that a request that may
        have killed the replica takes no others with it.
        """
        left = set(requests.numbers)
        timeout_s = max(requests.timeouts_s)
        deadline = time.monotonic() + timeout_s

        async def ask(some: Requests) -> None:
            response = self.streaming.run.remote(some)
            try:
                async for piece in response:
                    left.difference_update(piece.answered)
                    deliver(piece)
            except asyncio.CancelledError:
                response.cancel()
                raise

        try:
            await self._once(lambda: ask(requests), deadline, timeout_s)
        except LOST:
            for alone in requests.one_by_one():
                [number] = alone.numbers
                if number not in left:
                    continue
                await asyncio.sleep(RETRY_PAUSE_S)
                try:
                    await self._once(functools.partial(ask, alone), deadline, timeout_s)
                except LOST:
                    left.remove(number)
                    deliver(Piece((), [], {number: DIED}))
        if left:
            raise errors.internal()


def refused(refusal: Refusal, param: str) -> DureError:
    """The error for a client whose request a model refused."""
    param = refusal.field or param
    if refusal.kind == "too_large":
        return errors.too_large(refusal.reason, param)
    if refusal.kind == "late":
        return DureError(504, errors.LATE, refusal.reason, param)
    if refusal.kind == "failed":
        return DureError(500, "model_failed", refusal.reason, param)
    return errors.invalid(refusal.reason, param)
