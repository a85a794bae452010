"""Calls to a model: they wait while it loads, share batches through its coalescer, and survive a replica that dies."""

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
from serve.progress import Following, Progress, reporting
from serve.waiting import end

CUT = Refusal("the model's process died while it answered; send the request again", "lost")
DIED = Refusal("the model's process died twice while it worked on this; send something smaller", "failed")


class Model(Deployment):
    """A model's deployment, with the items that wait for it. Calls may come while it is still loading or asleep."""

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
            apart=settings.task == "chat",
        )
        self.gate.running = lambda: self.coalescer.under_way
        self.begun: set[int] = set()
        """Numbers of items whose clients have seen a part of the answer."""

    async def ask(self, requests: list[Any], caller: Caller, following: Following | None = None) -> Answers:
        """A result or a Refusal for each of `requests`, one per item. Raises DureError for any other failure.

        While the model loads this waits, and `following` is told how far it is.
        """
        max_tokens = self.watch.max_tokens(self.name)
        work = [turns(request, max_tokens) for request in requests]
        async with self.gate.admitted(sum(work), caller.left_s() if self.patient else 0, caller, len(requests)):
            try:
                if self.watch.state(self.name) == "ready":
                    return await self._ask(requests, work, caller, following)
                async with reporting(following, self._report_loading) if following else contextlib.nullcontext():
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
            await self._wait_for_load(min(self.load_wait_s, caller.left_s()))
            return await self._ask(requests, work, caller, following)
        # A model that is asleep gets a replica once a call waits for one, so the call is made before it has loaded.
        asking = asyncio.ensure_future(self._ask(requests, work, caller, following))
        loaded = asyncio.ensure_future(self._wait_for_load(caller.left_s()))
        try:
            await asyncio.wait((asking, loaded), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                loaded.result()
            return await asking
        finally:
            await end(asking, loaded)

    async def _wait_for_load(self, timeout_s: float) -> None:
        """Wait until the model is ready. Raises DureError if it has failed or is not ready in time."""
        state = await self.watch.settled(self.name, timeout_s)
        if state == "failed":
            raise errors.failed(self.name, self.watch.reason(self.name))
        if state != "ready":
            raise errors.loading(self.name, 5)

    async def _report_loading(self, following: Following) -> None:
        """Tell the follower how far the model is, until it is ready."""
        while self.watch.state(self.name) != "ready":
            following.report(Progress("queued", doing="loading", loaded=self.watch.progress(self.name)))
            await self.watch.changed()

    async def results(self, requests: list[Any], caller: Caller, param: str, following: Following | None = None) -> Any:
        """As `ask`, but returns results alone, in a list or a dataclass of arrays, one for each of `requests`.

        Raises DureError for the first that was refused; `param` is the field of the client's request that holds them.
        """
        answers = await self.ask(requests, caller, following)
        if answers.refusals:
            number = min(answers.refusals)
            raise refused(answers.refusals[number], f"{param}.{number}" if len(requests) > 1 else param)
        return answers.results

    def _note_begun(self, piece: Piece) -> None:
        """Any call may bring progress of items in others, also of some that have been answered meanwhile."""
        for number, progress in piece.progress.items():
            if progress.delta and number in self.coalescer.owners:
                self.begun.add(number)

    async def _send(self, requests: Requests, deliver: Callable[[Piece], None]) -> None:
        """Send one call to a replica, and pass on the results as they come.

        If the replica dies, each unanswered item is sent once more, in a call of its own and one after the other, so
        that an item that may have killed the replica takes no others with it.
        """
        left = set(requests.numbers)
        self.begun -= left
        timeout_s = max(requests.timeouts_s)
        deadline = time.monotonic() + timeout_s

        async def ask(some: Requests) -> None:
            response = self.streaming.run.remote(some)
            try:
                async for piece in response:
                    left.difference_update(piece.answered)
                    self._note_begun(piece)
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
                if number in self.begun:  # its client has seen a part of the answer, and another would not go on there
                    left.remove(number)
                    deliver(Piece((), [], {number: CUT}))
                    continue
                await asyncio.sleep(RETRY_PAUSE_S)
                try:
                    await self._once(functools.partial(ask, alone), deadline, timeout_s)
                except LOST:
                    left.remove(number)
                    deliver(Piece((), [], {number: DIED}))
        finally:
            self.begun.difference_update(requests.numbers)
        if left:
            raise errors.internal()


def refused(refusal: Refusal, param: str) -> DureError:
    """The error for the client whose item a model refused. `param` is the field, unless the refusal names one."""
    param = refusal.field or param
    if refusal.kind == "too_large":
        return errors.too_large(refusal.reason, param)
    if refusal.kind == "late":
        return DureError(504, errors.LATE, refusal.reason, param)
    if refusal.kind == "lost":
        return DureError(503, "unavailable", refusal.reason, None, refusal.retry_after_s)
    if refusal.kind == "busy":
        return DureError(429, "queue_full", refusal.reason, None, refusal.retry_after_s)
    if refusal.kind == "failed":
        return DureError(500, "model_failed", refusal.reason, param)
    return DureError(400, "invalid_request", refusal.reason, param, code=refusal.code)
