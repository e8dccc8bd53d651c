"""Gives every request an id, the caller's `X-Request-ID` or a new one, in its response and logs.

Also joins the caller's trace, if there's a `traceparent`, and logs each request once its response
has been sent. Doesn't depend on any route.
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
"""Paths that monitoring polls all the time; only their failures are logged."""


class NameRequests:
    """Middleware that gives each request an id and logs it with its outcome."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent = headers.get(_NAME, b"")
        name = sent.decode("ascii") if _USABLE.fullmatch(sent) else secrets.token_hex(16)
        scope["request_id"] = name
        # Not unbound at the end: the server runs each request in its own context, and the
        # traceback that it logs after an internal error should carry the id too.
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
            _log(scope, status, time.perf_counter() - began)


def _log(scope: Scope, status: int, seconds: float) -> None:
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
