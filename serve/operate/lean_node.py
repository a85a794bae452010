"""Ray's node without the processes that nobody asks anything of on a single machine, which take 165 MB."""

from __future__ import annotations

from typing import Any

from ray._private.node import Node


class LeanNode(Node):  # type: ignore[misc]
    """Without a monitor, which would start more machines, without a dashboard, and without one that copies logs to a
    driver: Serve's are written by the processes themselves.
    """

    def start_monitor(self) -> None: ...

    def start_log_monitor(self) -> None: ...

    def start_api_server(self, **_: Any) -> None: ...
