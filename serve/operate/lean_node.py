"""Ray's node without the processes that a single machine does not need, which take 165 MB."""

from __future__ import annotations

from typing import Any

from ray._private.node import Node


class LeanNode(Node):  # type: ignore[misc]
    """Starts no monitor, which would start more machines, no dashboard, and no log monitor, which would copy logs to a
    driver: Serve's processes write their own.
    """

    def start_monitor(self) -> None: ...

    def start_log_monitor(self) -> None: ...

    def start_api_server(self, **_: Any) -> None: ...
