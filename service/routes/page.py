"""The page at `/` and its files, with headers that restrict it to this server.

The page itself needs no key; its data comes from the other routes, which do if there are keys. The
files come from the package and are read once. Doesn't know their content.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from service.http.conditional import matches

router = APIRouter(include_in_schema=False)

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    tag: str


@cache
def _shipped() -> dict[str, _File]:
    """The files of `service/web` by name."""
    shipped = {}
    for entry in files("service").joinpath("web").iterdir():
        media_type = _MEDIA_TYPES.get(PurePosixPath(entry.name).suffix)
        if media_type is not None:
            body = entry.read_bytes()
            shipped[entry.name] = _File(body, media_type, hashlib.sha256(body).hexdigest()[:32])
    return shipped


@router.get("/")
@router.head("/")
def page(request: Request) -> Response:
    """The page."""
    return _file_response(request, "index.html")


@router.get("/web/{name}")
@router.head("/web/{name}")
def page_file(request: Request, name: str) -> Response:
    """A script, the style sheet or the icon of the page."""
    return _file_response(request, name)


def _file_response(request: Request, name: str) -> Response:
    file = _shipped().get(name)
    if file is None:
        raise HTTPException(404)
    headers = {**_HEADERS, "ETag": f'"{file.tag}"'}
    if matches(request.headers.get("if-none-match"), file.tag):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
