"""Signed URLs: they let anyone read one path without a key, until they expire.

A signature is the HMAC of the path and the time of expiry. It doesn't depend on a key, so revoking
keys leaves it valid; changing the secret invalidates all of them. A service without keys neither
signs nor checks.
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Callable
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials
from pydantic import BaseModel, ConfigDict, Field

from service.http.auth import Gate, bearer, caller
from service.http.errors import InvalidSignature

_STEPS = 24
"""An expiry is rounded up to this part of the lifetime, so that browsers can cache by URL."""

Expires = Annotated[int | None, Field(description="When a signed URL expires, since the epoch.")]
Signature = Annotated[
    str | None, Field(max_length=100, description="Of a signed URL; replaces the API key.")
]


class Signed(BaseModel):
    """Base class of the queries of routes that accept signed URLs."""

    model_config = ConfigDict(extra="forbid")

    expires: Expires = None
    signature: Signature = None


class UrlSigner:
    """Signs paths for `seconds` with `secret()`, which is called once, at first use."""

    def __init__(self, gate: Gate, secret: Callable[[], str], seconds: int) -> None:
        self._gate = gate
        self._make_secret = secret
        self._seconds = seconds

    def sign(self, path: str) -> str:
        """The path with an expiry and a signature, if the service has keys and signs URLs."""
        if self._gate.is_open or not self._seconds:
            return path
        step = max(1, self._seconds // _STEPS)
        expires = (int(time.time() + self._seconds) // step + 1) * step
        return f"{path}?expires={expires}&signature={self._signature(path, expires)}"

    def check(self, path: str, expires: int | None, signature: str) -> None:
        """Raises InvalidSignature if the signature isn't ours, or has expired."""
        expected = self._signature(path, expires or 0)
        # Compared as bytes, because text that isn't ASCII can't be.
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            raise InvalidSignature("the URL's signature is invalid: it was changed or made up")
        if time.time() > (expires or 0):
            raise InvalidSignature("the URL has expired: read the job again for a new one")

    def _signature(self, path: str, expires: int) -> str:
        digest = hmac.digest(self._secret, f"{path}\n{expires}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode("ascii").rstrip("=")

    @cached_property
    def _secret(self) -> bytes:
        return self._make_secret().encode()


async def viewer(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    expires: Annotated[Expires, Query()] = None,
    signature: Annotated[Signature, Query()] = None,
) -> str | None:
    """The caller's tenant; None if the URL is signed, so that it doesn't matter.

    An API key goes first. Raises InvalidSignature, Unauthenticated, RateLimited, CrossSite.
    """
    context = request.app.state.context
    if signature is not None and credentials is None and not context.gate.is_open:
        context.signer.check(request.scope["path"], expires, signature)
        return None
    return (await caller(request, credentials)).tenant


Viewer = Annotated[str | None, Depends(viewer)]
"""The tenant whose images may be read; None for any, because the URL was signed for its job."""
