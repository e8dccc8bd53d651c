"""Compresses large JSON and text responses for callers that accept gzip.

Starlette's middleware does it. This adds what it leaves out: entity tags become weak, because the
compressed bytes aren't those that the tag names, and `gzip;q=0` is respected. Images, archives and
streams of events are sent as they are, and so is JSON that is mostly images in base64, which would
cost much time for little.
"""

import re

from starlette.datastructures import MutableHeaders
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALLEST_BYTES = 1024
"""Smaller responses are sent as they are."""

_LEVEL = 4
_INLINE_BYTES = 32 * 2**10
"""Larger responses are compressed on a thread, to keep the event loop free."""

_UNSUITABLE = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "image/*", "application/octet-stream")
_WITH_PICTURES = ("/v1/images/", "/sdapi/")
_NO_GZIP = re.compile(rb"gzip\s*;\s*q=0(\.0*)?\s*(,|$)", re.IGNORECASE)


class CompressText:
    """Middleware that compresses JSON and text."""

    def __init__(self, app: ASGIApp) -> None:
        self._plain = app
        self._compressing = GZipMiddleware(
            app,
            minimum_size=SMALLEST_BYTES,
            compresslevel=_LEVEL,
            thread_minimum_size=_INLINE_BYTES,
            exclude_content_types=_UNSUITABLE,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and compress its response, if that's suitable."""
        if scope["type"] != "http" or scope["path"].startswith(_WITH_PICTURES):
            await self._plain(scope, receive, send)
            return
        refuses = _NO_GZIP.search(dict(scope["headers"]).get(b"accept-encoding", b""))
        if refuses:
            kept = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            scope = {**scope, "headers": kept}

        async def weakening_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                tag = headers.get("etag", "")
                if "content-encoding" in headers and tag.startswith('"'):
                    headers["etag"] = f"W/{tag}"
            await send(message)

        await self._compressing(scope, receive, weakening_send)
