"""One call of a stage, from its start to its recorded end. Whatever happens in between, its outcome is recorded."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from deployments.messages import Answer, Question
from serve import errors
from serve.caller import Caller
from serve.calls.model import Model
from serve.errors import DureError
from serve.progress import Following
from serve.services.adverts import stages
from serve.services.adverts.stages import Sources, Stage, Stages, VariantKey
from serve.waiting import end

logger = logging.getLogger("ray.serve")

STARTS = 3
"""Attempts to start a stage whose variant keeps changing."""
RENEWALS = 4
"""A lease is renewed at least this many times before it would run out."""
FIRST_RENEWAL_S, LONGEST_RENEWAL_S = 0.2, 1.0
"""Pauses between renewals, which also report the call's progress to followers."""


@dataclass(frozen=True)
class StageRequest:
    """What a stage asks a model."""

    model: Model
    question: Question
    verdict: type[BaseModel]
    record: dict[str, Any]
    """The request as the trace records it."""
    gone: bool = False
    """The client has left, so nobody waits for the answer."""


class StageCalls:
    """Runs calls under leases; `on_end` is called after each end that is recorded."""

    def __init__(self, record: Stages, on_end: Callable[[], None]) -> None:
        self.stages = record
        self.on_end = on_end
        self.ending: set[asyncio.Task[bool]] = set()
        """Outcomes that are being recorded, which goes on even if the client has left."""

    async def run(
        self,
        stage: Stage,
        key: VariantKey,
        call: uuid.UUID,
        caller: Caller,
        ask: Callable[[Sources], Awaitable[StageRequest]],
        overlay_id: uuid.UUID | None = None,
        following: Following | None = None,
    ) -> dict[str, Any]:
        """Start the stage, ask the model, and record the outcome, whatever it is. Returns the answer for the client.

        `ask` makes the request to the model. A call that has been made before gets its recorded answer. Raises
        DureError.
        """
        started = time.monotonic()
        if known := await self.stages.outcome(key, call):
            return _answer(key, call, known)  # a repeat: the first answer was lost on its way
        request = await self._start(stage, key, call, ask, overlay_id)
        verdict: dict[str, Any] | None = None
        problem: DureError | None = None
        gone = request.gone
        try:
            if not gone:
                verdict = await self._verdict(stage, call, request, caller, following or Following())
        except DureError as error:
            problem = error
        except asyncio.CancelledError:
            gone = True
        except Exception:
            logger.exception("stage %s failed", stage.step)
            problem = errors.internal()
        if gone:
            problem = errors.gone()
        response = verdict if problem is None else stages.failure(problem.kind, problem.message)
        assert response is not None
        elapsed_ms = round(1000 * (time.monotonic() - started))
        ending = asyncio.get_running_loop().create_task(
            self.stages.end(stage, key, call, response, elapsed_ms, problem.message if problem else None)
        )
        self.ending.add(ending)
        ending.add_done_callback(self._ended)
        if gone:
            raise asyncio.CancelledError
        if not await asyncio.shield(ending):
            raise problem or stages.lost(stage)
        if problem is not None:
            raise problem
        return _answer(key, call, response)

    async def _start(
        self,
        stage: Stage,
        key: VariantKey,
        call: uuid.UUID,
        ask: Callable[[Sources], Awaitable[StageRequest]],
        overlay_id: uuid.UUID | None,
    ) -> StageRequest:
        """Start the stage; returns the request to the model. Raises DureError or CancelledError if it did not start.

        If the client leaves meanwhile and the stage has started all the same, the request is marked `gone`.
        """
        for _ in range(STARTS):
            sources = await self.stages.sources(stage, key, call, overlay_id)
            request = await ask(sources)
            starting = asyncio.ensure_future(self.stages.start(stage, key, call, sources.revision, request.record))
            try:
                started = await asyncio.shield(starting)
            except asyncio.CancelledError:
                if not await starting:
                    raise
                return replace(request, gone=True)
            if started:
                return request
        raise errors.conflict("the variant keeps changing; send the request again", "job_variants_id", 1)

    def _ended(self, ending: asyncio.Task[bool]) -> None:
        self.ending.discard(ending)
        if not ending.cancelled() and ending.exception():
            logger.error("the outcome of a stage could not be recorded: %r", ending.exception())
        else:
            self.on_end()

    async def _verdict(
        self, stage: Stage, call: uuid.UUID, request: StageRequest, caller: Caller, following: Following
    ) -> dict[str, Any]:
        """The model's verdict. Raises DureError, also if the lease is lost."""
        results = request.model.results([request.question], caller, "image", following)
        asking = asyncio.ensure_future(results)
        holding = asyncio.ensure_future(self._hold_lease(call, following))
        try:
            await asyncio.wait((asking, holding), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise stages.lost(stage)
            answers: list[Answer] = asking.result()
            return request.verdict.model_validate_json(answers[0].json).model_dump()
        finally:
            await end(asking, holding)

    async def _hold_lease(self, call: uuid.UUID, following: Following) -> None:
        """Renew the lease; returns once it has been lost."""
        pause_s = FIRST_RENEWAL_S
        while True:
            await asyncio.sleep(min(pause_s, self.stages.lease_s / RENEWALS))
            pause_s = min(2 * pause_s, LONGEST_RENEWAL_S)
            try:
                if not await self.stages.renew(call, following.progress.fields() if following.progress else {}):
                    return
            except Exception as error:  # the database may be back before the lease runs out
                logger.warning("a lease could not be renewed: %s", error)


def _answer(key: VariantKey, call: uuid.UUID, response: dict[str, Any]) -> dict[str, Any]:
    """The answer to the client from a recorded response. Raises DureError if that is a failure."""
    if "error" in response:
        raise DureError(503, response["error"]["type"], response["error"]["message"], None, 1)
    return {"job_id": str(key.job_id), "vlm_trace_id": str(call), **response}
