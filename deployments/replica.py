"""The Serve class of all model deployments."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict

from ray import serve

from deployments.gpu_share import POLL_S, GpuShare, planned_bytes
from deployments.load_progress import LoadProgress
from deployments.loaded_model import Live, reason
from deployments.loopback import keep_to_loopback
from deployments.messages import Piece, Requests
from deployments.metrics import LOAD_SECONDS, REGISTRY, RELOADS, WEIGHTS
from deployments.outlet import Outlet
from deployments.scaling import BACKLOG, ITEMS, Backlogs
from deployments.spec import ModelSpec, Order

logger = logging.getLogger("ray.serve")

SPINS = "1000"
"""How often an OpenMP thread with a core of its own polls for work before it sleeps. Waking a thread is so slow that
two threads were no faster than one if they slept at once: a lone request for next words at KoGPT2's size took 81 ms, 54
ms with 1,000 polls and 49 ms with 5,000. With another process that took a whole core it was 86, 111 and 203 ms."""


class ModelReplica:
    """Loads a model, answers requests in batches, and reloads the model in another form when ordered to.

    Serve sends no request before the constructor returns, so a new replica is warm before it takes traffic. During a
    reload the old model keeps answering. Once the new one is warm, the old one finishes its calls and is freed.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: ModelSpec, make_outlet: Callable[[], Outlet]
    ) -> None:
        keep_to_loopback()
        if spec.own_cores:
            os.environ["GOMP_SPINCOUNT"] = SPINS  # overrides OMP_WAIT_POLICY; read when torch is imported
        self.spec = spec
        self.backlogs = Backlogs()
        self.reloading: asyncio.Task[None] | None = None
        self.gpu: GpuShare | None = None
        """None on a CPU."""
        self.ordered = 0
        """Number of the newest order begun. The same order, or an older one, is ignored if it arrives after that."""
        self.outlet = make_outlet()
        loop = asyncio.get_running_loop()
        order = await loop.run_in_executor(
            None,
            lambda: self.outlet.open(
                spec.name,
                str(serve.get_replica_context().replica_id.unique_id),
                REGISTRY,
                spec.deploy,
                lambda order: loop.call_soon_threadsafe(self._reload, order),
            ),
        )
        try:
            self.live = await Live.load(order.applied_to(spec) if order else spec, LoadProgress(self.outlet.event))
        except Exception:
            await asyncio.sleep(0.5)  # the process ends with this constructor; send the report first
            raise
        await self._report(order)

    async def run(self, requests: Requests) -> AsyncGenerator[Piece, None]:
        """Yield a result or a Refusal per request, batch by batch."""
        self.backlogs.update(requests.caller, requests.backlog)
        async with contextlib.aclosing(self.live.run(requests)) as pieces:
            async for piece in pieces:
                yield piece

    async def check_health(self) -> None:
        """Raises if the engine is dead. Serve then replaces this replica."""
        self.live.batcher.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers for `deployments.scaling`, in items rather than calls."""
        return {ITEMS: self.live.batcher.items, BACKLOG: self.backlogs.total()}

    def _reload(self, order: Order) -> None:
        if order.number > self.ordered:
            self.ordered = order.number
            self.reloading = asyncio.get_running_loop().create_task(self._carry_out(order))

    async def _carry_out(self, order: Order) -> None:
        """Load the model as ordered, put it in the old one's place, and let the old one finish. Reports a failure."""
        try:
            new = await Live.load(
                order.applied_to(self.spec), LoadProgress(lambda event: self.outlet.event(event, order.number))
            )
        except Exception as error:
            logger.warning("reload order %d failed: %r", order.number, error)
            RELOADS.labels("failed").inc()
            self.outlet.refused(order, reason(error))
            return
        self.live, old = new, self.live
        RELOADS.labels("done").inc()
        await self._report(order)
        await old.retire()

    async def _report(self, order: Order | None) -> None:
        """Report the loaded model's facts to the board and to metrics, and its use of the GPU from now on."""
        facts = self.live.engine.facts
        WEIGHTS.set(facts.weights_bytes)
        LOAD_SECONDS.set(self.live.load_seconds)
        about_load = {
            "source": self.live.spec.source,
            "load_seconds": round(self.live.load_seconds, 2),
            "pid": os.getpid(),
            "in_steps": self.live.in_steps,
            "parallel": self.live.parallel,
            "max_tokens": getattr(self.live.engine, "max_tokens", None),
            "capabilities": getattr(self.live.engine, "capabilities", None),
            "version": ".".join(
                [self.spec.deploy, str(order.number if order else 0), self.live.content, facts.runtime, facts.precision]
            ),
        }
        self.outlet.facts(asdict(facts) | about_load, order)
        if facts.device == "cuda" and self.spec.gpu_share:
            await self._report_gpu_use()

    async def _report_gpu_use(self) -> None:
        """Note what the loaded model is planned to use. The first time, start to report what this process does use."""
        planned = await asyncio.to_thread(planned_bytes, self.live.spec)
        first = self.gpu is None
        self.gpu = self.gpu or GpuShare.on_cuda(self.spec.name, self.spec.gpu_share)
        self.gpu.planned(planned)
        if first:
            self.polling = asyncio.create_task(self._poll(self.gpu))

    async def _poll(self, gpu: GpuShare) -> None:
        while True:
            if use := gpu.change():
                self.outlet.gpu(use)
            await asyncio.sleep(POLL_S)
