"""Checks addresses in a config file: where Dure listens, and the servers it calls.

Each function returns the given address unchanged or raises ValueError. Messages never repeat the address, because a URL
may hold a password.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

CACHES = ("memory", "redis", "rediss", "unix")
DATABASES = ("sqlite://", "postgresql://")
MOST_PORT = 65_535
LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""One part of a host name, between dots."""


def to_listen_on(host: str) -> str:
    """An IPv4 address or a host name."""
    labels = host.split(".")
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError("write an IPv4 address or a host name")
    if labels[-1].isdecimal():
        ipaddress.IPv4Address(host)
    return host


def of_images(host: str) -> str:
    """HOST or HOST:PORT. An IPv6 address has neither brackets nor a port here."""
    name, _, port = host.rpartition(":") if host.count(":") == 1 else (host, "", "1")
    if not re.fullmatch(r"[^\s/@]+", name) or not (port.isdecimal() and 1 <= int(port[:6]) <= MOST_PORT):
        raise ValueError("write HOST or HOST:PORT")
    return host


def of_a_webhook(url: str) -> str:
    """An http or https URL."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = None
    if not usable or re.search(r"\s", url):
        raise ValueError("write http://HOST/PATH or https://HOST:PORT/PATH")
    return url


def of_a_cache(url: str) -> str:
    """The URL of the process's own memory or of a Redis server."""
    scheme, _, rest = url.partition("://")
    if scheme == "memory" or (scheme in CACHES and rest and _for_redis(url)):
        return url
    raise ValueError(f"write the URL of a cache: {', '.join(f'{scheme}://...' for scheme in CACHES)}")


def of_a_database(url: str) -> str:
    """The URL of an SQLite file or a PostgreSQL database."""
    from sqlalchemy.engine import make_url  # here, because model processes do not need it
    from sqlalchemy.exc import ArgumentError

    try:
        if url.startswith(DATABASES) and (make_url(url).port or 1) <= MOST_PORT:
            return url
    except (ArgumentError, ValueError):
        pass
    raise ValueError("write the URL of a store: sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME")


def _for_redis(url: str) -> bool:
    from redis.connection import parse_url  # here, because it takes a second and the default does not need it

    try:
        return bool(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError:
        return False
