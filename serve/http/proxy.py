"""Protects Serve's own proxies, which take requests where HAProxy is absent, or while no ingress answers HAProxy."""

from __future__ import annotations

import uvicorn
from starlette.middleware import Middleware
from uvicorn.config import Config

from serve.config.settings import WebSocketSettings
from serve.http.headers import Tidy
from serve.http.server import ServerBounds, serve_behind
from serve.http.sockets import FRAMES_PER_MESSAGE

MAX_MESSAGE_BYTES = 16 * 2**20
"""Uvicorn's default. A proxy does not know the app's limits; the ingress behind it enforces them."""


def protect() -> list[Middleware]:
    """Called by each process that is about to serve HTTP. An ingress has set up its own border by then."""
    if uvicorn.Config is Config:
        frames_per_s = FRAMES_PER_MESSAGE * WebSocketSettings().max_messages_per_s
        serve_behind(Tidy, ServerBounds(MAX_MESSAGE_BYTES, frames_per_s))
    return []
