"""Keeps a replica's own gRPC port off the network where the cluster is one machine on loopback."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as serve_replica


def keep_to_loopback() -> None:
    """Bind the port through which replicas call each other to 127.0.0.1 on a node whose address that is.

    Serve binds it to all addresses and has no setting for it. Ray's token guards it, but a port that nobody outside
    needs is better closed. It is opened after a replica's constructor, so calling this in a constructor is in time.
    On a cluster of several machines it stays as it is: they must reach each other.
    """
    if not ray.util.get_node_ip_address().startswith("127."):
        return
    bind = serve_replica.add_port_to_grpc_server

    def bind_to_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace("[::]", "127.0.0.1")))

    serve_replica.add_port_to_grpc_server = bind_to_loopback
