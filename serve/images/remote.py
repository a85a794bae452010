"""Fetches images from other servers: only from hosts that the config allows, never from a private network by accident.

The host name is resolved once, every address is checked, and the connection goes to a checked address. So the name
can't point elsewhere between check and connection. Redirects follow the same rules.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from serve import errors
from serve.config.services import FetchSettings
from serve.errors import DureError

logger = logging.getLogger("ray.serve")

REDIRECTS = 3
LONGEST_SHOWN = 100
"""Characters of a host name shown in a message."""
PORTS = {"http": 80, "https": 443}


async def fetch(url: str, settings: FetchSettings, max_bytes: int, param: str) -> bytes:
    """The bytes at the URL. Raises DureError naming `param` if it may not or can't be fetched."""
    try:
        async with asyncio.timeout(settings.timeout_s), httpx.AsyncClient(trust_env=False, timeout=None) as client:
            for _ in range(1 + REDIRECTS):
                content, redirect = await _get(client, url, settings, max_bytes, param)
                if redirect is None:
                    return content
                url = urljoin(url, redirect)
    except TimeoutError as error:
        raise errors.invalid(f"{param}: the image did not arrive within {settings.timeout_s:g} s", param) from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        logger.info("%s could not be fetched: %r", param, error)
        raise errors.invalid(f"{param}: the host did not give the image", param) from error
    raise errors.invalid(f"{param}: more than {REDIRECTS} redirects", param)


async def _get(
    client: httpx.AsyncClient, url: str, settings: FetchSettings, max_bytes: int, param: str
) -> tuple[bytes, str | None]:
    """The body and None, or an empty body and the address of the redirect."""
    parts = allowed(url, settings, param)
    host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
    address = await _resolve(host, port, settings, param)
    target = parts._replace(netloc=f"[{address}]:{port}" if ":" in address else f"{address}:{port}", fragment="")
    headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
    request = client.build_request("GET", target.geturl(), headers=headers, extensions={"sni_hostname": host})
    response = await client.send(request, stream=True)
    try:
        if response.has_redirect_location:
            return b"", response.headers["Location"]
        if response.status_code != httpx.codes.OK:
            raise errors.invalid(f"{param}: the host answered {response.status_code}", param)
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > max_bytes:
                raise errors.too_large(f"{param}: the image is over {max_bytes / 2**20:g} MB", param)
        return bytes(content), None
    finally:
        await response.aclose()


def allowed(url: str, settings: FetchSettings, param: str) -> SplitResult:
    """The URL's parts. Raises DureError if it may not be fetched."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise _refused(f"is not a URL ({error})", param) from error
    if parts.scheme not in PORTS or not host or parts.username is not None or parts.password is not None:
        raise _refused("is neither the path of a stored image nor a plain http or https URL", param)
    if not settings.hosts:
        raise _refused(
            "is a URL, and fetching is off; send the image as the overlay, or give the path of a stored image", param
        )
    known = {host, f"{host}:{port or PORTS[parts.scheme]}"}
    if not known & set(settings.hosts):
        raise _refused(f"points to {host[:LONGEST_SHOWN]!r}, which is not among the allowed hosts", param)
    shown = f"[{host}]" if ":" in host else host
    return parts._replace(netloc=f"{shown}:{port}" if port else shown)


async def _resolve(host: str, port: int, settings: FetchSettings, param: str) -> str:
    """An address of the host. Raises DureError if any of its addresses is not public."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not settings.private_addresses and not all(_is_public(address) for address in addresses):
        raise _refused(f"points to {host[:LONGEST_SHOWN]!r}, which is in a private network", param)
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast


NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""https://www.rfc-editor.org/rfc/rfc6052: IPv4 addresses embedded in IPv6 addresses."""


def _refused(why: str, param: str) -> DureError:
    return errors.invalid(f"{param} {why}", param)
