"""The page at `/` and its files, with headers that restrict it to this server.

The page itself needs no key; its data comes from the other routes, which do if there are keys. The
files come from the package and are read once, except `names.js`, which is made from the table of
request fields. Doesn't know their content.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from jobs.fields import FIELDS, PER_IMAGE, PER_JOB
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
    """The files of `service/web` by name, and `names.js`."""
    entries = files("service").joinpath("web").iterdir()
    bodies = {entry.name: entry.read_bytes() for entry in entries} | {"names.js": _field_names()}
    shipped = {}
    for name, body in bodies.items():
        media_type = _MEDIA_TYPES.get(PurePosixPath(name).suffix)
        if media_type is not None:
            shipped[name] = _File(body, media_type, hashlib.sha256(body).hexdigest()[:32])
    return shipped


def _field_names() -> bytes:
    """A script with the request fields that differ per image, and those with one value per job."""
    per_job = [name for name in PER_JOB if FIELDS[name].in_request]
    lists = {"PER_IMAGE": list(PER_IMAGE), "PER_JOB": per_job}
    return "".join(f"export const {k} = {json.dumps(v)};\n" for k, v in lists.items()).encode()


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
