"""Keeps a replica's gRPC port off the network if the cluster is a single machine on loopback."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as serve_replica


def keep_to_loopback() -> None:
    """On a loopback node, bind the port through which replicas call each other to 127.0.0.1.

    Serve binds it to all addresses and has no setting for it. Ray's token guards the port, but nobody outside needs it.
    Serve opens it after a replica's constructor, so a constructor can call this in time. In a cluster of several
    machines nothing changes, as replicas must reach each other.
    """
    if not ray.util.get_node_ip_address().startswith("127."):
        return
    bind = serve_replica.add_port_to_grpc_server

    def bind_to_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace("[::]", "127.0.0.1")))

    serve_replica.add_port_to_grpc_server = bind_to_loopback
