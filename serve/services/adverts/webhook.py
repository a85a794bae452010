"""Delivers events to a webhook, at least once each; `X-Dure-Event-ID` identifies repeats."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import time
import uuid

import httpx
import orjson

from serve.config.services import WebhookSettings
from serve.errors import DureError
from serve.store.outbox import Delivery, Outbox
from serve.waiting import within

logger = logging.getLogger("ray.serve")

POLL_S = 1.0
"""How often to look for due events while nothing calls `wake`."""
AT_ONCE = 16
LONGEST_ERROR = 300


def signature(secret: str, at: int, body: bytes) -> str:
    """Value of the header X-Dure-Signature: HMAC-SHA256 over the Unix time, a dot and the body."""
    mac = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256)
    return f"t={at},v1={mac.hexdigest()}"


class Dispatcher:
    def __init__(self, outbox: Outbox, settings: WebhookSettings) -> None:
        self.outbox = outbox
        self.settings = settings
        self.client = httpx.AsyncClient(timeout=settings.timeout_s, trust_env=False)
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to deliver; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def wake(self) -> None:
        """Look for due events now."""
        self._due.set()

    async def _run(self) -> None:
        while True:
            self._due.clear()
            deliveries: list[Delivery] = []
            try:
                deliveries = await self.outbox.claim(AT_ONCE)
                await asyncio.gather(*(self._deliver(delivery) for delivery in deliveries))
            except DureError as error:
                logger.warning("events could not be delivered: %s", error)
            except Exception:
                logger.exception("events could not be delivered")
            if len(deliveries) < AT_ONCE:
                await within(self._due, POLL_S)

    async def _deliver(self, delivery: Delivery) -> None:
        problem = await self._post(delivery.event_id, orjson.dumps(delivery.payload))
        if problem is None:
            await self.outbox.delivered(delivery.event_id)
            return
        last = delivery.attempt >= self.settings.max_attempts
        logger.warning("event %s, attempt %d: %r", delivery.event_id, delivery.attempt, problem)
        await self.outbox.failed(delivery.event_id, problem, None if last else self._pause_s(delivery.attempt))

    async def _post(self, event_id: uuid.UUID, body: bytes) -> str | None:
        """Why the webhook did not accept the event; None if it did."""
        headers = {
            "Content-Type": "application/json",
            "X-Dure-Event-ID": str(event_id),
            "X-Dure-Signature": signature(self.settings.secret, int(time.time()), body),
        }
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                response = await self.client.post(self.settings.url, content=body, headers=headers)
        except Exception as error:  # whatever the error, this was an attempt
            return f"{type(error).__name__}: {error}"[:LONGEST_ERROR]
        return None if response.is_success else f"the webhook answered {response.status_code}"

    def _pause_s(self, attempt: int) -> float:
        """Doubles with each attempt, with jitter, so that events that failed together are not retried together."""
        pause_s: float = min(self.settings.first_retry_s * 2 ** (attempt - 1), self.settings.longest_retry_s)
        return pause_s * random.uniform(0.75, 1.25)
