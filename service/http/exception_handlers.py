"""Starlette's exception handlers: every failure is sent in one of two formats.

OpenAI's routes respond in OpenAI's envelope, all others with a problem document.
"""

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import FieldProblem, ImagemillError
from service.http import request_id
from service.http.errors import (
    Failure,
    as_openai,
    as_problem,
    failure_of,
    pointer,
    sentence,
    summary,
)

OPENAI_PATHS = ("/v1/images/", "/v1/files", "/v1/batches")

_OURS = ("/v1/jobs", "/v1/events", "/v1/workers")
"""Paths below /v1 that OpenAI doesn't have. At the others its clients may ask for something that we
don't have, such as a model or a chat."""

log = structlog.get_logger(__name__)


def install(app: FastAPI) -> None:
    """Register the handlers, so that `app` sends every failure in our formats."""
    app.add_exception_handler(ImagemillError, _on_our_error)
    app.add_exception_handler(RequestValidationError, _on_bad_parameters)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_fault)


def _response(request: Request, failure: Failure) -> Response:
    path = request.url.path
    if path.startswith(OPENAI_PATHS):
        return as_openai(failure)
    return as_problem(failure, with_openai=path.startswith("/v1/") and not path.startswith(_OURS))


async def _on_our_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for ImagemillError."""
    assert isinstance(error, ImagemillError)
    if failure_of(error).status >= 500:
        log.warning("request failed", path=request.url.path, error=str(error))
    return _response(request, failure_of(error))


async def _on_bad_parameters(request: Request, error: Exception) -> Response:
    """Starlette's handler for invalid query, path and header values."""
    assert isinstance(error, RequestValidationError)
    fields = tuple(
        FieldProblem(pointer(tuple(detail["loc"])), sentence(detail["type"], detail["msg"]))
        for detail in error.errors()
    )
    return _response(request, Failure(422, summary(len(fields)), "invalid-request", fields))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for the framework's own errors: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"not found: {request.url.path}"
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
        detail = f"{request.url.path} only accepts {headers['Allow']}"
    return _response(request, Failure(error.status_code, detail, headers=headers))


async def _on_fault(request: Request, error: Exception) -> Response:
    """Starlette's handler for a bug; the server logs the traceback itself."""
    detail = "internal error; see the service's log"
    # This response bypasses our middleware, so the id must be added here.
    headers = {request_id.HEADER: request.scope["request_id"]}
    return _response(request, Failure(500, detail, "internal", headers=headers))


def _methods_of(request: Request) -> list[str]:
    """All methods that are allowed at the request's path."""
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    routes = request.app.router.routes
    return [
        method
        for method in methods
        if any(route.matches({**request.scope, "method": method})[0].value == 2 for route in routes)
    ]
