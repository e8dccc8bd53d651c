"""Who calls: the tenant whose jobs a request may see, and that tenant's share.

While the service listens on a loopback address and has no keys, everybody is the tenant `local`.
Knows no route.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request: its tenant, and its weight in the fair share."""

    tenant: str
    weight: float = 1.0


def caller() -> Caller:
    """The caller of the request at hand."""
    return Caller(LOCAL)


AnyCaller = Annotated[Caller, Depends(caller)]
