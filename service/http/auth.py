"""Authentication: the caller's tenant, its share of the workers, and its limits.

As soon as one key exists, every request except health checks must carry one. Without keys, all
callers are the tenant `local`; that's only allowed while the service listens on a loopback address
or `IMAGEMILL_ANONYMOUS` is set. Doesn't depend on any route.
"""

import math
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import (
    HTTPAuthorizationCredentials,
    HTTPBasic,
    HTTPBasicCredentials,
    HTTPBearer,
)
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import HTTPConnection

from jobs.errors import ConfigurationError
from service.http.cross_site import check_site
from service.http.errors import RateLimited, Unauthenticated
from service.keys import Key, KeyRing
from service.settings import ServiceSettings

LOCAL = "local"


class _Basic(HTTPBasic):
    """FastAPI's, except that a header that it can't read is no credential instead of a 401.

    Some clients send `Basic` with nothing after it if their user has set no password.
    """

    async def __call__(  # type: ignore[override]
        self, request: HTTPConnection
    ) -> HTTPBasicCredentials | None:
        try:
            return await super().__call__(request)
        except HTTPException:
            return None


bearer = HTTPBearer(
    auto_error=False, scheme_name="key", description="An API key, if the service has any."
)
_basic = _Basic(
    auto_error=False, scheme_name="basic", description="Any name, and an API key as the password."
)


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request. `max_unfinished` None means the service's own quota.

    `key` is the id of its API key, None on a service without keys.
    """

    tenant: str
    weight: float = 1.0
    max_unfinished: int | None = None
    max_priority: int = 9
    key: str | None = None


class Gate:
    """Authenticates callers by their keys and enforces each key's rate, per process.

    Without any keys, all callers are admitted if it `may_be_open`, and none otherwise.
    """

    def __init__(self, ring: KeyRing, *, may_be_open: bool) -> None:
        self._ring = ring
        self._may_be_open = may_be_open
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def admit(self, key_text: str | None) -> Caller:
        """The caller for this key. Raises Unauthenticated, RateLimited."""
        if self.is_open:
            return Caller(LOCAL)
        if key_text is None:
            raise Unauthenticated("API key required: send Authorization: Bearer KEY")
        key = self._ring.find(key_text)
        if key is None:
            raise Unauthenticated("unknown API key")
        self._count(key)
        return Caller(key.tenant, key.weight, key.max_unfinished, key.max_priority, key.id)

    @property
    def is_open(self) -> bool:
        """Whether callers need no key."""
        return self._may_be_open and not self._ring

    def _count(self, key: Key) -> None:
        if key.rate is None:
            return
        rate = parse(key.rate)
        if not self._limiter.hit(rate, key.id):
            reset = self._limiter.get_window_stats(rate, key.id).reset_time
            wait = max(1, math.ceil(reset - time.time()))
            raise RateLimited(f"rate limit of this key exceeded: {key.rate}", wait)


def check_reach(settings: ServiceSettings, ring: KeyRing) -> None:
    """Refuse to serve other machines without a key by accident. Raises ConfigurationError."""
    if not (settings.may_be_open or ring):
        raise ConfigurationError(
            f"host {settings.host} can be reached from other machines and there is no API key: "
            "add one with `imagemill keys add NAME`, or set IMAGEMILL_ANONYMOUS=true"
        )


async def caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Caller:
    """The caller of this request. Raises Unauthenticated, RateLimited, CrossSite."""
    return _admit(request, credentials.credentials if credentials else None)


async def caller_by_password(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    basic: Annotated[HTTPBasicCredentials | None, Depends(_basic)],
) -> Caller:
    """Like `caller`, but the key may also be the password of Basic authentication."""
    key_text = basic.password if basic else credentials.credentials if credentials else None
    return _admit(request, key_text)


def _admit(request: Request, key_text: str | None) -> Caller:
    gate: Gate = request.app.state.context.gate
    if gate.is_open:
        check_site(request, request.app.state.context.settings)
    return gate.admit(key_text)


AnyCaller = Annotated[Caller, Depends(caller)]
CallerByPassword = Annotated[Caller, Depends(caller_by_password)]
