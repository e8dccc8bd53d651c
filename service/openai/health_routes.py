"""Health checks under the paths where clients of other servers look for them."""

from fastapi import APIRouter

from service.context import Context
from service.http.openapi import problems
from service.routes.health import check_readiness
from service.submit.schemas import Readiness

router = APIRouter(tags=["health"])


@router.get("/health", response_model=Readiness, responses=problems(422, 503))
@router.head("/health", include_in_schema=False)
def check_engine_health(context: Context) -> Readiness:
    """The same as `/readyz`: images can be generated."""
    return check_readiness(context)


@router.get("/v1/health", response_model=Readiness, responses=problems(422, 503))
@router.head("/v1/health", include_in_schema=False)
def check_engine_health_under_v1(context: Context) -> Readiness:
    """The same as `/readyz`: images can be generated."""
    return check_readiness(context)
