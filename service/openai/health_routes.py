"""Health checks under the paths where clients of other servers look for them."""

from fastapi import APIRouter

from service.context import Context
from service.http.openapi import problems
from service.routes.health import ready
from service.submit.schemas import Readiness

router = APIRouter(tags=["health"])


@router.get("/health", response_model=Readiness, responses=problems(422, 503))
@router.get("/v1/health", response_model=Readiness, responses=problems(422, 503))
@router.head("/health", include_in_schema=False)
@router.head("/v1/health", include_in_schema=False)
def health(context: Context) -> Readiness:
    """The same as `/readyz`: images can be generated."""
    return ready(context)
