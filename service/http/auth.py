"""Who calls: the tenant whose jobs a request may see, its share, and what it may ask for.

Once there is a key, every request but those for health shows one. Without keys, everybody is the
tenant `local`; that is only so while the service listens on a loopback address, or is told to be
open (`IMAGEMILL_ANONYMOUS`). Knows no route.
"""

import math
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import (
    HTTPAuthorizationCredentials,
    HTTPBasic,
    HTTPBasicCredentials,
    HTTPBearer,
)
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from jobs.errors import ConfigurationError
from service.http.cross_site import check_site
from service.http.errors import RateLimited, Unauthenticated
from service.keys import Key, KeyRing
from service.settings import ServiceSettings

LOCAL = "local"

_bearer = HTTPBearer(
    auto_error=False, scheme_name="key", description="An API key, where the service has any."
)
_basic = HTTPBasic(
    auto_error=False, scheme_name="basic", description="Any name, and an API key as the password."
)


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request. `max_unfinished` None means the service's own quota."""

    tenant: str
    weight: float = 1.0
    max_unfinished: int | None = None
    max_priority: int = 9


class Gate:
    """Lets callers in by their keys, as often as their keys allow; rates are per process.

    Without any keys everybody is let in if it `may_be_open`, and nobody otherwise.
    """

    def __init__(self, ring: KeyRing, *, may_be_open: bool) -> None:
        self._ring = ring
        self._may_be_open = may_be_open
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def admit(self, shown: str | None) -> Caller:
        """The caller who shows this key. Raises Unauthenticated, RateLimited."""
        if self.is_open:
            return Caller(LOCAL)
        if shown is None:
            raise Unauthenticated("this service wants an API key: Authorization: Bearer KEY")
        key = self._ring.find(shown)
        if key is None:
            raise Unauthenticated("this API key is not known here")
        self._count(key)
        return Caller(key.tenant, key.weight, key.max_unfinished, key.max_priority)

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
            raise RateLimited(f"this key may make {key.rate} requests", wait)


def check_reach(settings: ServiceSettings, ring: KeyRing) -> None:
    """Refuse to be open to other machines by accident. Raises ConfigurationError."""
    if not (settings.may_be_open or ring):
        raise ConfigurationError(
            f"host {settings.host} can be reached from other machines and there is no API key: "
            "make one with `imagemill keys add NAME`, or set IMAGEMILL_ANONYMOUS=true"
        )


async def caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """The caller of the request at hand. Raises Unauthenticated, RateLimited, CrossSite."""
    return _admit(request, credentials.credentials if credentials else None)


async def caller_by_password(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    basic: Annotated[HTTPBasicCredentials | None, Depends(_basic)],
) -> Caller:
    """As `caller`, for clients that know no bearer keys: the key may be Basic's password."""
    shown = basic.password if basic else credentials.credentials if credentials else None
    return _admit(request, shown)


def _admit(request: Request, shown: str | None) -> Caller:
    gate: Gate = request.app.state.context.gate
    if gate.is_open:
        check_site(request, request.app.state.context.settings)
    return gate.admit(shown)


AnyCaller = Annotated[Caller, Depends(caller)]
CallerByPassword = Annotated[Caller, Depends(caller_by_password)]
