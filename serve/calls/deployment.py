"""Calls to a deployment: a bound on what waits for it, a deadline, and errors that a client can act on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from grpc.aio import AioRpcError  # type: ignore[import-untyped]
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from serve import errors
from serve.caller import Caller
from serve.errors import DureError
from serve.progress import Following, Progress
from serve.queues.gate import Gate

TRIES = 2
"""A call whose replica died is repeated on another, but only once, as it may be what killed the replica. Model calls
have no side effects; service calls carry the ids they create, so repeats are idempotent."""
RETRY_PAUSE_S = 0.2
LOST = (RayActorError, DeploymentUnavailableError, AioRpcError)


class Deployment:
    """A deployment that this process calls. If `patient`, a request waits for room in a full queue."""

    def __init__(
        self,
        name: str,
        handle: DeploymentHandle,
        max_queue: int,
        patient: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`weights` by tenant; 1 if there is none."""
        self.name = name
        self.handle = handle
        self.gate = Gate(name, max_queue, weights)
        self.patient = patient

    async def call(
        self,
        *arguments: Any,
        caller: Caller,
        method: str = "run",
        admitted: bool = False,
        grace_s: float | None = None,
        following: Following | None = None,
    ) -> Any:
        """Call a method within the caller's deadline; `admitted` says that the caller has passed the gate already.

        With `grace_s` the method gets the caller, and `grace_s` past its deadline to report that it has passed.
        `following` receives the progress of a service. Raises DureError for everything that can go wrong.
        """

        async def attempt() -> Any:
            limit = {} if grace_s is None else {"caller": caller}
            if following is None:
                return await _result(getattr(self.handle, method).remote(*arguments, **limit))
            return await _last(self.streaming.followed.remote(method, *arguments, **limit), following)

        async with contextlib.nullcontext() if admitted else self.gate.admitted(1, caller=caller):
            started = time.monotonic()
            result = await self._with_retries(attempt, caller.left_s() + (grace_s or 0))
            self.gate.served(1, started)
            return result

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """What a method yields; closing the iterator cancels it. Raises DureError."""
        response = getattr(self.streaming, method).remote(*arguments)
        try:
            async for item in response:
                yield item
        except RayTaskError as error:
            raise _of_task(error) from error
        except BackPressureError as error:
            raise errors.at_capacity(self.name) from error
        except LOST as error:
            raise errors.unavailable(self.name) from error
        finally:
            response.cancel()

    @functools.cached_property
    def streaming(self) -> DeploymentHandle:
        return self.handle.options(stream=True)

    async def _with_retries(self, attempt: Callable[[], Awaitable[Any]], timeout_s: float) -> Any:
        """What `attempt` returns. It is repeated if its replica dies."""
        deadline = time.monotonic() + timeout_s
        for _ in range(TRIES - 1):
            try:
                return await self._once(attempt, deadline, timeout_s)
            except LOST:
                await asyncio.sleep(RETRY_PAUSE_S)
        try:
            return await self._once(attempt, deadline, timeout_s)
        except LOST as error:
            raise errors.unavailable(self.name) from error

    async def _once(self, attempt: Callable[[], Awaitable[Any]], deadline: float, timeout_s: float) -> Any:
        """What `attempt` returns. Raises DureError, or one of LOST if its replica died."""
        try:
            return await asyncio.wait_for(attempt(), max(0.001, deadline - time.monotonic()))
        except TimeoutError as error:
            raise errors.too_late(self.name, timeout_s) from error
        except RayTaskError as error:
            raise _of_task(error) from error
        except BackPressureError as error:
            raise errors.at_capacity(self.name) from error


def _of_task(error: RayTaskError) -> DureError:
    return error.cause if isinstance(error.cause, DureError) else errors.internal()


async def _result(response: DeploymentResponse) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _last(response: Any, following: Following) -> Any:
    """The last item of a stream; `following` receives the progress before it."""
    result: Any = None
    try:
        async for result in response:
            if isinstance(result, Progress):
                following.report(result)
        return result
    finally:
        response.cancel()
