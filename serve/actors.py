"""The cluster's small actors: one of each, found by name, started on first use, restarted when it dies."""

from __future__ import annotations

from typing import Any

import ray

NAMESPACE = "dure"


def only(actor: type, name: str, *arguments: Any) -> Any:
    """The one actor with this name. Every restart uses the `arguments` of the first start."""
    return (
        ray.remote(actor)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=10_000,
        )
        .remote(*arguments)
    )
