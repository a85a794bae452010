"""Addresses in a config file: where Dure listens, and where the servers are that it calls.

Each function takes an address and returns it as it is. They raise ValueError without repeating it: a URL may hold a
password.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

CACHES = ("memory", "redis", "rediss", "unix")
DATABASES = ("sqlite://", "postgresql://")
MOST_PORT = 65_535
LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""Of a host's name, between dots."""


def to_listen_on(host: str) -> str:
    """An IPv4 address, or a name that may stand for one."""
    labels = host.split(".")
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError("write an IPv4 address or the name of one")
    if labels[-1].isdecimal():
        ipaddress.IPv4Address(host)
    return host


def of_images(host: str) -> str:
    """HOST or HOST:PORT; an IPv6 address has no brackets here, and no port."""
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
    """The process's own memory, or a Redis."""
    scheme, _, rest = url.partition("://")
    if scheme == "memory" or (scheme in CACHES and rest and _for_redis(url)):
        return url
    raise ValueError(f"a cache is {', '.join(f'{scheme}://...' for scheme in CACHES)}")


def of_a_database(url: str) -> str:
    """A file of SQLite's, or a PostgreSQL."""
    from sqlalchemy.engine import make_url  # here, because processes of models have no use for it
    from sqlalchemy.exc import ArgumentError

    try:
        if url.startswith(DATABASES) and (make_url(url).port or 1) <= MOST_PORT:
            return url
    except (ArgumentError, ValueError):
        pass
    raise ValueError("a store is sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME")


def _for_redis(url: str) -> bool:
    from redis.connection import parse_url  # here, because it takes a second and the default needs none

    try:
        return bool(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError:
        return False
