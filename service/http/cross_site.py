"""Which web pages may call a service without keys through their visitor's browser.

Such a service trusts every program that can reach it: on loopback, all programs on its machine.
Browsers run other sites' pages too, so a request from localhost isn't necessarily trusted. A page
that reaches us under its own name (DNS rebinding) is recognized by the Host header, and another
site's requests by the Origin. Doesn't know about keys.
"""

from urllib.parse import urlsplit

from fastapi import Request

from service.http.errors import CrossSite
from service.settings import ServiceSettings, is_loopback

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def check_site(request: Request, settings: ServiceSettings) -> None:
    """Refuse a request from another site's page. Raises CrossSite.

    A service that is open on purpose accepts any Host.
    """
    host, origin = request.headers.get("host"), request.headers.get("origin")
    if not (settings.anonymous or host is None or _is_ours(host, settings)):
        raise CrossSite(
            f"invalid Host {host[:100]!r} for a service without keys: use its address, "
            "add a key, or set IMAGEMILL_PUBLIC_URL"
        )
    if request.method in _SAFE or {origin, "*"} & {*(settings.cors_origins or ())}:
        return
    ours = [host, *([_authority(settings.public_url)] if settings.public_url else [])]
    foreign = origin is not None and _authority(origin) not in ours
    is_cross_site = request.headers.get("sec-fetch-site") == "cross-site"
    if is_cross_site or (foreign and not settings.anonymous):
        raise CrossSite("pages of other sites can't do this without a key")


def _is_ours(host: str, settings: ServiceSettings) -> bool:
    """Whether a Host header means this machine, or is the host or public URL in the settings."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name in (settings.host, urlsplit(settings.public_url or "").hostname):
        return True
    return name.endswith(".localhost") or is_loopback(name)


def _authority(url: str) -> str:
    """Host and port of a URL, as in a Host header."""
    return url.partition("://")[2].partition("/")[0]
