"""Keeps a replica's own gRPC port off the network where the cluster is one machine on loopback."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as serve_replica


def keep_to_loopback() -> None:
    """Bind the port through which replicas call each other to 127.0.0.1 on a node whose address that is.

    Serve binds it to all addresses and takes pickled calls there without Ray's token, so on a laptop in a foreign
    network anyone could run code. There is no setting; the port is opened after a replica's constructor, so calling
    this in a constructor is in time. On a cluster nodes must reach each other: keep those ports inside its network.
    """
    if not ray.util.get_node_ip_address().startswith("127."):
        return
    bind = serve_replica.add_port_to_grpc_server

    def bind_to_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace("[::]", "127.0.0.1")))

    serve_replica.add_port_to_grpc_server = bind_to_loopback
