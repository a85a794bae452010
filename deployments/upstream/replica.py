"""The Serve class of chat models that another server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable

from ray import serve

from deployments.conversation import ChatRequest, Delta, TextPiece
from deployments.load_progress import LoadProgress
from deployments.loopback import keep_to_loopback
from deployments.messages import TO_ANSWER_S, ItemProgress, Piece, Refusal, Requests
from deployments.metrics import QUEUE, REGISTRY
from deployments.outlet import Outlet
from deployments.scaling import BACKLOG, ITEMS, Backlogs
from deployments.spec import ModelSpec, Order
from deployments.upstream.api import Api, End, UpstreamError, reply
from deployments.upstream.ollama import Ollama
from deployments.upstream.openai import OpenAI

logger = logging.getLogger("ray.serve")

PROBE_EVERY_S = 5.0
MISSES = 2
"""Probes that fail in a row until the upstream counts as away. One may be due to a busy machine."""
FAILED = "the model failed on this item; the reason is in the replica's log"
NOT_CHANGED = "another server runs this model; reload it there"


class UpstreamReplica:
    """Passes requests on to the upstream and its answers back, as they come.

    While the upstream is away, the model counts as loading: requests wait for it, as long as they wait for any model.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: ModelSpec, make_outlet: Callable[[], Outlet]
    ) -> None:
        keep_to_loopback()
        assert spec.upstream
        self.spec = spec
        self.api: Api = (Ollama if spec.upstream.kind == "ollama" else OpenAI)(spec.upstream)
        self.backlogs = Backlogs()
        self.answering: dict[int, asyncio.Task[None]] = {}
        """By item number."""
        self.outlet = make_outlet()
        loop = asyncio.get_running_loop()
        name = str(serve.get_replica_context().replica_id.unique_id)
        await loop.run_in_executor(
            None, lambda: self.outlet.open(spec.name, name, REGISTRY, spec.deploy, self._refuse_order)
        )
        self.watching = loop.create_task(self._watch())

    async def run(self, requests: Requests) -> AsyncGenerator[Piece, None]:
        """Yield a result or a Refusal per request, and what is written of followed ones."""
        self.backlogs.update(requests.caller, requests.backlog)
        for number in requests.taken_back:
            if task := self.answering.get(number):
                task.cancel()
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        tasks = []
        for request, timeout_s, number in zip(requests.items, requests.timeouts_s, requests.numbers, strict=True):
            followed = number in requests.followed
            task = asyncio.create_task(self._answer(request, timeout_s, number, followed, pieces))
            self.answering[number] = task
            tasks.append(task)
        QUEUE.set(len(self.answering))
        left = len(tasks)
        try:
            while left:
                piece = await pieces.get()
                left -= len(piece)
                yield piece
        finally:
            for number, task in zip(requests.numbers, tasks, strict=True):
                task.cancel()
                self.answering.pop(number, None)
            QUEUE.set(len(self.answering))
            await asyncio.gather(*tasks, return_exceptions=True)

    async def check_health(self) -> None:
        """Raises RuntimeError if nothing watches the upstream any more. Serve then replaces this replica."""
        if self.watching.done():
            raise RuntimeError(f"nothing watches the upstream: {self.watching!r}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers for `deployments.scaling`, in items rather than calls."""
        return {ITEMS: len(self.answering), BACKLOG: self.backlogs.total()}

    async def _answer(
        self, request: ChatRequest, timeout_s: float, number: int, followed: bool, pieces: asyncio.Queue[Piece]
    ) -> None:
        """Put the answer to a request into `pieces`: deltas of a followed one, then the result or a Refusal."""
        written: list[TextPiece] = []
        end = End("length")
        seconds = timeout_s - min(TO_ANSWER_S, timeout_s / 2)
        try:
            try:
                async with asyncio.timeout(seconds), contextlib.aclosing(self.api.answer(request)) as answer:
                    async for each in answer:
                        if isinstance(each, End):
                            end = each
                            continue
                        written.append(each)
                        if followed:
                            delta = Delta(len(written) - 1, (each,))
                            pieces.put_nowait(
                                Piece((), [], {}, {number: ItemProgress(tokens=len(written), delta=delta)})
                            )
            except TimeoutError:
                if not written:
                    raise UpstreamError(Refusal(f"{self.api.upstream.url} has not answered in time", "late")) from None
            pieces.put_nowait(Piece([number], [reply(written, end)], {}))
        except UpstreamError as error:
            pieces.put_nowait(Piece((), [], {number: error.refusal}))
        except asyncio.CancelledError:
            pieces.put_nowait(Piece((), [], {number: Refusal("it was cancelled", "late")}))
            raise
        except Exception:  # an upstream may answer anything
            logger.exception("an answer of %s could not be read", self.api.upstream.url)
            pieces.put_nowait(Piece((), [], {number: Refusal(FAILED, "failed")}))

    async def _watch(self) -> None:
        """Report whether the upstream is there and has the model."""
        while True:
            progress, started = LoadProgress(self.outlet.event), time.monotonic()
            progress.waiting(self.api.upstream.url)
            await self._until_loaded(progress)
            progress.ready()
            self.outlet.facts(self._facts(time.monotonic() - started))
            await self._until_away()

    async def _until_loaded(self, progress: LoadProgress) -> None:
        while True:
            try:
                await self.api.load(progress)
                return
            except UpstreamError as error:
                progress.waiting(str(error))
            await asyncio.sleep(PROBE_EVERY_S)

    async def _until_away(self) -> None:
        misses = 0
        while misses < MISSES:
            await asyncio.sleep(PROBE_EVERY_S)
            try:
                await self.api.probe()
                misses = 0
            except UpstreamError as error:
                misses += 1
                logger.warning("the upstream is away: %s", error)

    def _facts(self, seconds: float) -> dict[str, object]:
        upstream = self.api.upstream
        return {
            "source": f"{upstream.model} at {upstream.url}",
            "device": "upstream",
            "runtime": upstream.kind,
            "load_seconds": round(seconds, 2),
            "in_steps": True,
            "parallel": 1,
            "capabilities": ["completion", "tools"],
            "version": f"{self.spec.deploy}.{upstream.kind}",
        }

    def _refuse_order(self, order: Order) -> None:
        self.outlet.refused(order, NOT_CHANGED)
