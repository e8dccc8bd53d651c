"""Errors as HTTP: one table from error class to status, and the two forms that answers take.

Every answer that is not a success is a `Failure` first; it goes out as an RFC 9457 problem
document, or in OpenAI's envelope on OpenAI's routes; `service/http/exception_handlers.py` decides
which. Knows no route and no store.
"""

import http
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from jobs import errors
from jobs.errors import FieldProblem, ImagemillError

MAX_FIELD_PROBLEMS = 1000
"""Bad fields that one answer names; a body of nothing else cannot make a larger answer."""


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


class NoPreview(ImagemillError):
    """There is nothing to see of the image yet."""


class Gone(ImagemillError):
    """The image was made, but its file is no longer there."""


class Unauthenticated(ImagemillError):
    """The caller showed no key, or one that is not known."""


class CrossSite(ImagemillError):
    """A browser brought the request from another site's page."""


class RateLimited(ImagemillError):
    """The key has been used too often; in `seconds` it may be used again."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class CallerLeft(ImagemillError):
    """The caller hung up before its images were made; nobody reads this answer."""


class TookTooLong(ImagemillError):
    """The images were not made while the caller could wait on the line."""


class ImagesFailed(ImagemillError):
    """A worker could not make the images that the caller waits for; trying again would not help."""


class NotReady(ImagemillError):
    """The service cannot make images at the moment; the message says what is missing."""


STATUS: dict[type[ImagemillError], tuple[int, str]] = {
    MalformedBody: (400, "malformed-body"),
    MalformedHeader: (400, "malformed-header"),
    Unauthenticated: (401, "unauthenticated"),
    CrossSite: (403, "cross-site"),
    errors.UnknownModel: (404, "unknown-model"),
    errors.NotFound: (404, "not-found"),
    NoPreview: (404, "no-preview"),
    CallerLeft: (408, "caller-left"),
    errors.Conflict: (409, "conflict"),
    Gone: (410, "gone"),
    BodyTooLarge: (413, "body-too-large"),
    UnsupportedBody: (415, "unsupported-body"),
    Unsatisfiable: (416, "range-not-satisfiable"),
    errors.InvalidRequest: (422, "invalid-request"),
    errors.IdempotencyMismatch: (422, "idempotency-mismatch"),
    errors.QuotaExceeded: (429, "quota-exceeded"),
    RateLimited: (429, "rate-limited"),
    ImagesFailed: (502, "images-failed"),
    errors.StorageUnavailable: (503, "storage-unavailable"),
    NotReady: (503, "not-ready"),
    TookTooLong: (504, "took-too-long"),
    ImagemillError: (500, "internal"),
}
"""What each error class is in HTTP: status, and the last part of the problem's type."""

RETRY_AFTER_SECONDS = {429: 5, 503: 2}
"""When trying again may help, by status."""

_FINAL = frozenset({"images-failed", "conflict", "idempotency-mismatch", "took-too-long"})
"""Failures that clients of OpenAI's would try again by their status, where it cannot help."""

_SENTENCES = {"extra_forbidden": "unknown field", "missing": "required"}


class AsciiResponse(JSONResponse):
    """JSON in ASCII, so that any text a caller sent can be quoted in it."""

    def render(self, content: Any) -> bytes:
        """Compact JSON; a lone surrogate in it becomes its escape."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def status_of(error: ImagemillError) -> tuple[int, str]:
    """Status and slug of an error: those of the nearest class in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that is not a success, before it takes one form or another.

    `slug` is the last part of the problem's type; `fields` are the bad ones.
    """

    status: int
    detail: str
    slug: str | None = None
    fields: tuple[FieldProblem, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, Any] = field(default_factory=dict)


def failure_of(error: ImagemillError) -> Failure:
    """What one of our errors is in HTTP."""
    status, slug = status_of(error)
    return Failure(
        status=status,
        detail=str(error),
        slug=slug,
        fields=tuple(error.problems) if isinstance(error, errors.InvalidRequest) else (),
        headers=_headers_of(error),
        extensions={"known": error.known} if isinstance(error, errors.UnknownModel) else {},
    )


def _headers_of(error: ImagemillError) -> dict[str, str]:
    if isinstance(error, Unsatisfiable):
        return {"Content-Range": f"bytes */{error.size}"}
    if isinstance(error, RateLimited):
        return {"Retry-After": str(error.seconds)}
    if isinstance(error, NoPreview):
        return {"Retry-After": "1"}
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def as_problem(failure: Failure) -> JSONResponse:
    """An RFC 9457 problem document, with up to MAX_FIELD_PROBLEMS fields named."""
    document: dict[str, Any] = {
        "type": f"urn:imagemill:problem:{failure.slug}" if failure.slug else "about:blank",
        "title": http.HTTPStatus(failure.status).phrase,
        "status": failure.status,
        "detail": failure.detail,
        "errors": [
            {"pointer": one.pointer, "detail": one.detail}
            for one in failure.fields[:MAX_FIELD_PROBLEMS]
        ],
        **failure.extensions,
    }
    return _response(failure, failure.status, document, "application/problem+json")


def as_openai(failure: Failure) -> JSONResponse:
    """OpenAI's envelope; bad fields are 400 there, and the first one is named."""
    status = 400 if failure.status == 422 else failure.status
    document = {"error": openai_error(failure)}
    return _response(failure, status, document, "application/json")


def openai_error(failure: Failure) -> dict[str, str | None]:
    """What OpenAI's envelope holds."""
    kind = "invalid_request_error" if failure.status < 500 else "server_error"
    first = failure.fields[0] if failure.fields else None
    return {
        "message": first.detail if first else failure.detail,
        "type": "rate_limit_error" if failure.status == 429 else kind,
        "param": first.pointer.removeprefix("/").replace("/", ".") if first else None,
        "code": failure.slug.replace("-", "_") if failure.slug else None,
    }


def _response(
    failure: Failure, status: int, document: dict[str, Any], media_type: str
) -> JSONResponse:
    headers = dict(failure.headers)
    if status in RETRY_AFTER_SECONDS:
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS[status]))
    if failure.slug in _FINAL:
        headers["X-Should-Retry"] = "false"
    return AsciiResponse(document, status_code=status, headers=headers, media_type=media_type)


def invalid(error: ValidationError, prefix: tuple[str, ...] = ()) -> errors.InvalidRequest:
    """Pydantic's verdict on a body as ours, a pointer for each bad field."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    fields = tuple(
        FieldProblem(pointer((*prefix, *one["loc"])), sentence(one["type"], one["msg"]))
        for one in found
    )
    return errors.InvalidRequest(summary(len(fields)), fields)


def pointer(location: tuple[int | str, ...]) -> str:
    """An RFC 6901 pointer; parts in angle brackets name a union's branch and are left out."""
    parts = (str(part) for part in location)
    return "".join(
        "/" + part.replace("~", "~0").replace("/", "~1")
        for part in parts
        if not (part.startswith("<") and part.endswith(">"))
    )


def sentence(kind: str, message: str) -> str:
    """Pydantic's message of an error type, in our words."""
    return _SENTENCES.get(kind, message.removeprefix("Value error, "))


def summary(count: int) -> str:
    """How many bad fields there are, as a sentence."""
    shown = "" if count <= MAX_FIELD_PROBLEMS else f", the first {MAX_FIELD_PROBLEMS} are listed"
    return f"{count} field{'' if count == 1 else 's'} cannot be accepted{shown}"
