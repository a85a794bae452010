"""The one place where Dure patches Ray Serve's HTTP server.

Serve creates its uvicorn server itself, with 16 MB WebSocket messages and message compression, and offers no setting
for either. It looks up `uvicorn.Config` only after the ingress' constructor has run, so the name can be replaced first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import Config

from serve.config.settings import Limits, WebSocketSettings
from serve.http.sockets import FRAMES_PER_MESSAGE, BoundedSocket


@dataclass(frozen=True)
class ServerBounds:
    max_message_bytes: int
    max_frames_per_s: float

    @classmethod
    def of(cls, limits: Limits, websocket: WebSocketSettings) -> ServerBounds:
        return cls(limits.max_message_bytes, FRAMES_PER_MESSAGE * websocket.max_messages_per_s)


def serve_behind(border: Callable[[ASGIApp], ASGIApp], bounds: ServerBounds) -> None:
    """Wrap the app of every server that this process creates from now on in `border`, and bound its WebSockets."""

    class Bounded(Config):
        max_frames_per_s = bounds.max_frames_per_s

        def __init__(self, app: Any, **options: Any) -> None:
            bounded = {
                "ws": BoundedSocket,
                "ws_max_size": bounds.max_message_bytes,
                "ws_per_message_deflate": False,
            }
            super().__init__(app, **(options | bounded))

        def load(self) -> None:
            super().load()
            self.loaded_app = border(self.loaded_app)

    uvicorn.Config = Bounded  # type: ignore[assignment,misc]
