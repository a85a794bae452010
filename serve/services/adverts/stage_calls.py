"""One call of a stage, from its start to its end on record: whatever happens in between, there is an end."""

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
from serve.services.adverts.stages import Sources, Stage, Stages, Which

logger = logging.getLogger("ray.serve")

STARTS = 3
"""How often a stage is begun anew because its variant has changed meanwhile."""
RENEWALS = 4
"""Of a lease before it would end."""
FIRST_RENEWAL_S, LONGEST_RENEWAL_S = 0.2, 1.0
"""Renewing also tells followers how far the call is."""


@dataclass(frozen=True)
class Asked:
    """What a model is to be asked in a stage."""

    model: Model
    question: Question
    verdict: type[BaseModel]
    record: dict[str, Any]
    """Of it, for the trace."""
    gone: bool = False
    """Nobody waits for the answer any more."""


class StageCalls:
    """Makes calls under leases; `on_end` hears of each whose end is on record."""

    def __init__(self, record: Stages, on_end: Callable[[], None]) -> None:
        self.stages = record
        self.on_end = on_end
        self.ending: set[asyncio.Task[bool]] = set()

    async def run(
        self,
        stage: Stage,
        which: Which,
        call: uuid.UUID,
        timeout_s: float,
        ask: Callable[[Sources], Awaitable[Asked]],
        overlay_id: uuid.UUID | None = None,
        following: Following | None = None,
    ) -> dict[str, Any]:
        """Start the stage, ask the model, and put on record what came of it, whatever that is."""
        started, caller = time.monotonic(), Caller.waiting(timeout_s, which.tenant_id)
        if known := await self.stages.outcome(which, call):
            return _answer(which, call, known)  # it is made again, by one who did not hear of its end
        asked = await self._start(stage, which, call, ask, overlay_id)
        verdict: dict[str, Any] | None = None
        problem: DureError | None = None
        gone = asked.gone
        try:
            if not gone:
                verdict = await self._verdict(stage, call, asked, caller, following or Following())
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
            self.stages.end(stage, which, call, response, elapsed_ms, problem.message if problem else None)
        )
        self.ending.add(ending)
        ending.add_done_callback(self._ended)
        if gone:
            raise asyncio.CancelledError
        if not await asyncio.shield(ending):
            raise problem or stages.lost(stage)
        if problem is not None:
            raise problem
        return _answer(which, call, response)

    async def _start(
        self,
        stage: Stage,
        which: Which,
        call: uuid.UUID,
        ask: Callable[[Sources], Awaitable[Asked]],
        overlay_id: uuid.UUID | None,
    ) -> Asked:
        """What is to be asked in the stage, which has started. Raises DureError, and CancelledError, where it has not.

        A client that leaves just then is `gone` where the stage has started.
        """
        for _ in range(STARTS):
            sources = await self.stages.sources(stage, which, call, overlay_id)
            asked = await ask(sources)
            starting = asyncio.ensure_future(self.stages.start(stage, which, call, sources.revision, asked.record))
            try:
                started = await asyncio.shield(starting)
            except asyncio.CancelledError:
                if not await starting:
                    raise
                return replace(asked, gone=True)
            if started:
                return asked
        raise errors.conflict("the variant keeps changing; send the request again", "job_variants_id", 1)

    def _ended(self, ending: asyncio.Task[bool]) -> None:
        self.ending.discard(ending)
        if not ending.cancelled() and ending.exception():
            logger.error("what came of a stage is not on record: %r", ending.exception())
        else:
            self.on_end()

    async def _verdict(
        self, stage: Stage, call: uuid.UUID, asked: Asked, caller: Caller, following: Following
    ) -> dict[str, Any]:
        """What the model says. Raises DureError, also where the lease is lost."""
        results = asked.model.results([asked.question], caller, "image", following)
        asking = asyncio.ensure_future(results)
        holding = asyncio.ensure_future(self._hold(call, following))
        try:
            await asyncio.wait((asking, holding), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise stages.lost(stage)
            answers: list[Answer] = asking.result()
            return asked.verdict.model_validate_json(answers[0].json).model_dump()
        finally:
            for task in (asking, holding):
                task.cancel()
            await asyncio.gather(asking, holding, return_exceptions=True)

    async def _hold(self, call: uuid.UUID, following: Following) -> None:
        """Returns once the lease has been lost."""
        pause_s = FIRST_RENEWAL_S
        while True:
            await asyncio.sleep(min(pause_s, self.stages.lease_s / RENEWALS))
            pause_s = min(2 * pause_s, LONGEST_RENEWAL_S)
            try:
                if not await self.stages.renew(call, following.progress.told() if following.progress else {}):
                    return
            except Exception as error:  # a database that is away may be back before the lease ends
                logger.warning("a lease could not be renewed: %s", error)


def _answer(which: Which, call: uuid.UUID, response: dict[str, Any]) -> dict[str, Any]:
    """What is told of what is on record. Raises DureError where that is a failure."""
    if "error" in response:
        raise DureError(503, response["error"]["type"], response["error"]["message"], None, 1)
    return {"job_id": str(which.job_id), "vlm_trace_id": str(call), **response}
