"""Errors as HTTP: one table from error class to status, and the two response formats.

Every error response starts as a `Failure`. It's sent as an RFC 9457 problem document, or in
OpenAI's envelope on OpenAI's routes; `service/http/exception_handlers.py` decides which. Doesn't
depend on any route or on the store.
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
"""Invalid fields listed per response, so that a bad body can't blow up the response's size."""


class MalformedBody(ImagemillError):
    """The body is not JSON."""


class MalformedHeader(ImagemillError):
    """A header has an invalid value; the message names the header."""


class BodyTooLarge(ImagemillError):
    """The body exceeds the size limit."""


class UnsupportedBody(ImagemillError):
    """The route doesn't support the body's media type or encoding."""


class Unsatisfiable(ImagemillError):
    """The requested range is outside the file, which has `size` bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the requested range is outside the file's {size} bytes")
        self.size = size


class NoPreview(ImagemillError):
    """The image has no preview."""


class Gone(ImagemillError):
    """The image was generated, but its file has since been removed."""


class Unauthenticated(ImagemillError):
    """The API key is missing or unknown."""


class CrossSite(ImagemillError):
    """A browser sent the request on behalf of another site's page."""


class InvalidSignature(ImagemillError):
    """The URL's signature isn't valid for its path, or has expired."""


class RateLimited(ImagemillError):
    """The key has exceeded its rate limit; retry after `seconds`."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class CallerLeft(ImagemillError):
    """The caller disconnected before its images were generated; this response is never read."""


class GatewayTimeout(ImagemillError):
    """The images weren't generated within the time that a request may wait for them."""


class ImagesFailed(ImagemillError):
    """A worker couldn't generate the requested images; retrying wouldn't help."""


class NotReady(ImagemillError):
    """The service can't generate images at the moment; the message says what's missing."""


STATUS: dict[type[ImagemillError], tuple[int, str]] = {
    MalformedBody: (400, "malformed-body"),
    MalformedHeader: (400, "malformed-header"),
    Unauthenticated: (401, "unauthenticated"),
    CrossSite: (403, "cross-site"),
    InvalidSignature: (403, "invalid-signature"),
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
    GatewayTimeout: (504, "took-too-long"),
    ImagemillError: (500, "internal"),
}
"""Status and problem slug (the last part of the problem's type) of each error class."""

RETRY_AFTER_SECONDS = {429: 5, 503: 2}
"""Default `Retry-After`, by status."""

_FINAL = frozenset({"images-failed", "conflict", "idempotency-mismatch", "took-too-long"})
"""Failures that OpenAI's clients would retry because of their status, although it can't help."""

_LONGEST_GIVEN = 60

_SENTENCES = {"extra_forbidden": "unknown field", "missing": "required"}


class AsciiResponse(JSONResponse):
    """JSON in ASCII, because an error may quote any text that a caller sent."""

    def render(self, content: Any) -> bytes:
        """Compact JSON; lone surrogates are escaped."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def status_of(error: ImagemillError) -> tuple[int, str]:
    """Status and slug of an error, taken from its nearest base class in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error response, independent of its format.

    `slug` is the last part of the problem's type; `fields` are the invalid ones.
    """

    status: int
    detail: str
    slug: str | None = None
    fields: tuple[FieldProblem, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    extensions: Mapping[str, Any] = field(default_factory=dict)


def failure_of(error: ImagemillError) -> Failure:
    """The response for one of our errors."""
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


def as_problem(failure: Failure, *, with_openai: bool = False) -> JSONResponse:
    """An RFC 9457 problem document that lists up to MAX_FIELD_PROBLEMS fields.

    `with_openai` adds OpenAI's `error`, for paths that both kinds of clients ask.
    """
    document: dict[str, Any] = {
        "type": f"urn:imagemill:problem:{failure.slug}" if failure.slug else "about:blank",
        "title": http.HTTPStatus(failure.status).phrase,
        "status": failure.status,
        "detail": failure.detail,
        "errors": [
            {"pointer": problem.pointer, "detail": problem.detail}
            for problem in failure.fields[:MAX_FIELD_PROBLEMS]
        ],
        **failure.extensions,
        **({"error": openai_error(failure)} if with_openai else {}),
    }
    return _response(failure, failure.status, document, "application/problem+json")


def as_openai(failure: Failure) -> JSONResponse:
    """OpenAI's envelope; invalid fields are a 400 there, and only the first one is named."""
    status = 400 if failure.status == 422 else failure.status
    document = {"error": openai_error(failure)}
    return _response(failure, status, document, "application/json")


def openai_error(failure: Failure) -> dict[str, str | None]:
    """The `error` object of OpenAI's envelope."""
    kind = "invalid_request_error" if failure.status < 500 else "server_error"
    first = failure.fields[0] if failure.fields else None
    code = failure.slug.replace("-", "_") if failure.slug else None
    message, param = failure.detail, None
    if first:
        param = openai_param(first)
        message = first.detail
        if failure.slug == "invalid-request":
            code, message = openai_field_error(first)
    return {
        "message": message,
        "type": "rate_limit_error" if failure.status == 429 else kind,
        "param": param,
        "code": code,
    }


def openai_param(problem: FieldProblem) -> str:
    """OpenAI's name of an invalid field."""
    return problem.pointer.removeprefix("/").replace("/", ".")


def openai_field_error(problem: FieldProblem) -> tuple[str, str]:
    """OpenAI's code for an invalid field, and a message that names it.

    Clients show nothing but the message.
    """
    name = openai_param(problem)
    if problem.detail == _SENTENCES["extra_forbidden"]:
        return "unknown_parameter", f"Unknown parameter: '{name}'."
    if problem.detail == _SENTENCES["missing"]:
        return "missing_required_parameter", f"Missing required parameter: '{name}'."
    named = f"'{name}'" if name else "the request"
    return "invalid_value", f"Invalid value for {named}: {problem.detail}"


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
    """Pydantic's validation error as ours, with a pointer to each invalid field."""
    details = error.errors(include_url=False, include_context=False)
    fields = tuple(
        FieldProblem(
            pointer((*prefix, *detail["loc"])),
            sentence(detail["type"], detail["msg"]) + _given(detail["type"], detail["input"]),
        )
        for detail in details
    )
    return errors.InvalidRequest(summary(len(fields)), fields)


def pointer(location: tuple[int | str, ...]) -> str:
    """An RFC 6901 pointer, without the parts in angle brackets, which name a union's branch."""
    parts = (str(part) for part in location)
    return "".join(
        "/" + part.replace("~", "~0").replace("/", "~1")
        for part in parts
        if not (part.startswith("<") and part.endswith(">"))
    )


def sentence(kind: str, message: str) -> str:
    """Our message for one of Pydantic's error types."""
    return _SENTENCES.get(kind, message.removeprefix("Value error, "))


def _given(kind: str, value: Any) -> str:
    """What the caller sent, if it's short."""
    if kind in _SENTENCES or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, str) and len(value) > _LONGEST_GIVEN:
        return ""
    text = json.dumps(value)
    return f", not {text}" if len(text) <= _LONGEST_GIVEN else ""


def summary(count: int) -> str:
    """The number of invalid fields, as a sentence."""
    note = "" if count <= MAX_FIELD_PROBLEMS else f"; the first {MAX_FIELD_PROBLEMS} are listed"
    return f"{count} invalid field{'' if count == 1 else 's'}{note}"
