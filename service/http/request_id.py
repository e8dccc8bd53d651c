"""Every request has an id: the caller's `X-Request-ID`, or one of ours; in its answer and its logs.

A `traceparent` of the caller's is taken up here as well, and the log line of a request is written
here, when its answer has been sent. Knows no route.
"""

import re
import secrets
import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.runtime import tracing

log = structlog.get_logger("service.access")

HEADER = "X-Request-ID"
_NAME = HEADER.lower().encode("ascii")
_USABLE = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that machines ask for all the time; only their failures are logged."""


class NameRequests:
    """Middleware that names requests and logs each with its outcome."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under its name."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(_NAME, b"")
        name = given.decode("ascii") if _USABLE.fullmatch(given) else secrets.token_hex(16)
        scope["request_id"] = name
        # Not unbound at the end: the server runs each request in a context of its own, and a
        # fault that it logs afterwards should tell whose it is.
        structlog.contextvars.bind_contextvars(request_id=name)
        if b"traceparent" in headers:
            tracing.join(headers[b"traceparent"].decode("latin-1"))
        began, status = time.perf_counter(), 500

        async def naming_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (_NAME, name.encode("ascii"))]
            await send(message)

        try:
            await self._app(scope, receive, naming_send)
        finally:
            _tell(scope, status, time.perf_counter() - began)


def _tell(scope: Scope, status: int, seconds: float) -> None:
    if scope["path"] in _QUIET and status < 500:
        return
    about: dict[str, Any] = {
        {"job_id": "job"}.get(name, name): value
        for name, value in scope.get("path_params", {}).items()
        if name in ("job_id", "index")
    }
    log.info(
        "request",
        method=scope["method"],
        path=scope["path"],
        status=status,
        seconds=round(seconds, 4),
        **about,
    )
