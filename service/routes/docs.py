"""The API's documentation at `/docs`: Swagger UI, served without any other host.

The scripts and styles come from the package `fastapi_offline`; the page around them is ours. A
strict Content-Security-Policy keeps the page from making requests to other hosts. Like the document
itself (`/openapi.json`), it needs no key. Doesn't know the document's content.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from service.http.conditional import matches

router = APIRouter(include_in_schema=False)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>imagemill: the HTTP API</title>
<link rel="icon" href="web/icon.svg">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="api"></div>
<noscript>This page needs JavaScript. The OpenAPI document is at openapi.json.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,
});
"""
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {
    "": "text/html; charset=utf-8",
    "start.js": "text/javascript; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}


@router.get("/docs")
@router.head("/docs")
def page(request: Request) -> Response:
    """The page."""
    return _file_response(request, "")


@router.get("/docs/{name}")
@router.head("/docs/{name}")
def page_file(request: Request, name: str) -> Response:
    """A script or style sheet of the page."""
    return _file_response(request, name)


@cache
def _file(name: str) -> tuple[bytes, str]:
    """A file of the page and its entity tag."""
    ours = {"": _PAGE, "start.js": _START}
    if name in ours:
        body = ours[name].encode()
    else:
        body = files("fastapi_offline").joinpath("static", name).read_bytes()
    return body, hashlib.sha256(body).hexdigest()[:32]


def _file_response(request: Request, name: str) -> Response:
    if name not in _MEDIA_TYPES:
        raise HTTPException(404)
    body, tag = _file(name)
    headers = {**_HEADERS, "ETag": f'"{tag}"'}
    if matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=_MEDIA_TYPES[name], headers=headers)
