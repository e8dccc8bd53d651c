"""Whose pages may call a service without keys through their visitor's browser.

Such a service trusts whoever can reach it: on loopback, every program of its machine. A page of
another site is no such program, though the browser that shows it is. Its own address with another
site's name (DNS rebinding) is told by the Host, its requests by the Origin. Knows no key.
"""

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request

from service.http.errors import CrossSite
from service.settings import ServiceSettings

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def check_site(request: Request, settings: ServiceSettings) -> None:
    """Refuse a request that a page of another site has made. Raises CrossSite.

    A service that is open on purpose goes by any name.
    """
    host, origin = request.headers.get("host"), request.headers.get("origin")
    if not (settings.anonymous or host is None or _is_ours(host, settings)):
        raise CrossSite(
            f"without a key, this service does not go by the name {host[:100]!r}: use its address, "
            "make a key, or set IMAGEMILL_PUBLIC_URL"
        )
    if request.method in _SAFE or {origin, "*"} & {*(settings.cors_origins or ())}:
        return
    ours = [host, *([_place(settings.public_url)] if settings.public_url else [])]
    foreign = origin is not None and _place(origin) not in ours
    far = request.headers.get("sec-fetch-site") == "cross-site"
    if far or (foreign and not settings.anonymous):
        raise CrossSite("a page of another site may not do this without a key")


def _is_ours(host: str, settings: ServiceSettings) -> bool:
    """Whether a Host means this machine, or is what the settings call the service."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name in (settings.host, urlsplit(settings.public_url or "").hostname):
        return True
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _place(url: str) -> str:
    """Host and port of a URL, as a Host header has them."""
    return url.partition("://")[2].partition("/")[0]
