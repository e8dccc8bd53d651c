"""Errors as HTTP: one table from error class to status, and RFC 9457 problem documents.

Every answer that is not a success leaves through here as `application/problem+json`, whether the
store, the catalog, a route or the framework raised it. OpenAI-compatible routes wrap the same
table in OpenAI's envelope. Knows no route and no store.
"""

import http
import json
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jobs import errors
from jobs.errors import FieldProblem, ImagemillError

MAX_FIELD_PROBLEMS = 1000
"""Bad fields that one answer names; a body of nothing else cannot make a larger answer."""

log = structlog.get_logger(__name__)


class MalformedBody(ImagemillError):
    """The body is not JSON."""


class MalformedHeader(ImagemillError):
    """A header's value cannot be read; the message names the header."""


class BodyTooLarge(ImagemillError):
    """The body is larger than the service takes."""


class UnsupportedBody(ImagemillError):
    """The body's type or encoding is not one that the route reads."""


class Unsatisfiable(ImagemillError):
    """No byte of the asked range exists; `size` is how many there are."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the image has {size} bytes, and the range holds none of them")
        self.size = size


class Gone(ImagemillError):
    """The image was made, but its file is no longer there."""


class NotReady(ImagemillError):
    """The service cannot make images at the moment; the message says what is missing."""


STATUS: dict[type[ImagemillError], tuple[int, str]] = {
    MalformedBody: (400, "malformed-body"),
    MalformedHeader: (400, "malformed-header"),
    errors.UnknownModel: (404, "unknown-model"),
    errors.NotFound: (404, "not-found"),
    errors.Conflict: (409, "conflict"),
    Gone: (410, "gone"),
    BodyTooLarge: (413, "body-too-large"),
    UnsupportedBody: (415, "unsupported-body"),
    Unsatisfiable: (416, "range-not-satisfiable"),
    errors.InvalidRequest: (422, "invalid-request"),
    errors.IdempotencyMismatch: (422, "idempotency-mismatch"),
    errors.QuotaExceeded: (429, "quota-exceeded"),
    errors.StorageUnavailable: (503, "storage-unavailable"),
    NotReady: (503, "not-ready"),
    ImagemillError: (500, "internal"),
}
"""What each error class is in HTTP: status, and the last part of the problem's type."""

RETRY_AFTER_SECONDS = {429: 5, 503: 2}
"""When trying again may help, by status."""

_SENTENCES = {"extra_forbidden": "unknown field", "missing": "required"}


class ProblemResponse(JSONResponse):
    """A problem document. ASCII only, so that any text a caller sent can be quoted in it."""

    media_type = "application/problem+json"

    def render(self, content: Any) -> bytes:
        """Compact JSON; a lone surrogate in it becomes its escape."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def status_of(error: ImagemillError) -> tuple[int, str]:
    """Status and slug of an error: those of the nearest class in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def problem(
    status: int,
    detail: str,
    *,
    slug: str | None = None,
    fields: tuple[FieldProblem, ...] = (),
    headers: Mapping[str, str] | None = None,
    **extensions: Any,
) -> ProblemResponse:
    """A problem document of `status`; `fields` are named up to MAX_FIELD_PROBLEMS."""
    document: dict[str, Any] = {
        "type": f"urn:imagemill:problem:{slug}" if slug else "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "errors": [
            {"pointer": field.pointer, "detail": field.detail}
            for field in fields[:MAX_FIELD_PROBLEMS]
        ],
        **extensions,
    }
    merged = dict(headers or {})
    if status in RETRY_AFTER_SECONDS:
        merged.setdefault("Retry-After", str(RETRY_AFTER_SECONDS[status]))
    return ProblemResponse(document, status_code=status, headers=merged)


def problem_of(error: ImagemillError) -> ProblemResponse:
    """The problem document of one of our errors."""
    status, slug = status_of(error)
    fields = error.problems if isinstance(error, errors.InvalidRequest) else ()
    extensions = {"known": error.known} if isinstance(error, errors.UnknownModel) else {}
    headers = {"Content-Range": f"bytes */{error.size}"} if isinstance(error, Unsatisfiable) else {}
    return problem(
        status, str(error), slug=slug, fields=tuple(fields), headers=headers, **extensions
    )


def invalid(error: ValidationError, prefix: tuple[str, ...] = ()) -> errors.InvalidRequest:
    """Pydantic's verdict on a body as ours, a pointer for each bad field."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    fields = tuple(
        FieldProblem(pointer((*prefix, *one["loc"])), _sentence(one["type"], one["msg"]))
        for one in found
    )
    return errors.InvalidRequest(_summary(len(fields)), fields)


def pointer(location: tuple[int | str, ...]) -> str:
    """An RFC 6901 pointer; parts in angle brackets name a union's branch and are left out."""
    parts = (str(part) for part in location)
    return "".join(
        "/" + part.replace("~", "~0").replace("/", "~1")
        for part in parts
        if not (part.startswith("<") and part.endswith(">"))
    )


def _sentence(kind: str, message: str) -> str:
    return _SENTENCES.get(kind, message.removeprefix("Value error, "))


def _summary(count: int) -> str:
    shown = "" if count <= MAX_FIELD_PROBLEMS else f", the first {MAX_FIELD_PROBLEMS} are listed"
    return f"{count} field{'' if count == 1 else 's'} cannot be accepted{shown}"


async def on_our_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for ImagemillError."""
    assert isinstance(error, ImagemillError)
    if status_of(error)[0] >= 500:
        log.warning("request failed", path=request.url.path, error=str(error))
    return problem_of(error)


async def on_bad_parameters(request: Request, error: Exception) -> Response:
    """Starlette's handler for query, path and header values that FastAPI refused."""
    assert isinstance(error, RequestValidationError)
    fields = tuple(
        FieldProblem(pointer(tuple(one["loc"])), _sentence(one["type"], one["msg"]))
        for one in error.errors()
    )
    return problem(422, _summary(len(fields)), slug="invalid-request", fields=fields)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for what the framework itself refuses: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"nothing is at {request.url.path}"
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
        detail = f"{request.url.path} takes {headers['Allow']}"
    return problem(error.status_code, detail, headers=headers)


async def on_fault(request: Request, error: Exception) -> Response:
    """Starlette's handler for a bug; the server logs the traceback itself."""
    return problem(500, "the service met a fault of its own; its log says which", slug="internal")


def _methods_of(request: Request) -> list[str]:
    """All methods that some route takes at the request's path."""
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    routes = request.app.router.routes
    return [
        method
        for method in methods
        if any(route.matches({**request.scope, "method": method})[0].value == 2 for route in routes)
    ]
