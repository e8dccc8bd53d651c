"""Liveness, readiness and metrics."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from jobs.catalog import Catalog
from jobs.queue.decode import WorkerInfo
from service.context import Context
from service.http.errors import NotReady
from service.http.openapi import problems
from service.submit.schemas import Health, Readiness

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=Health)
@router.head("/healthz", include_in_schema=False)
async def check_health() -> Health:
    """The process is alive, whatever the state of the queue and the workers."""
    return Health()


@router.get("/readyz", response_model=Readiness, responses=problems(422, 503))
@router.head("/readyz", include_in_schema=False)
def check_readiness(context: Context) -> Readiness:
    """The queue is reachable and at least one model has a ready worker; otherwise 503 and why."""
    context.store.ping()
    workers = context.store.workers()
    models = {model.name: 0 for model in context.catalog}
    for worker in workers:
        if worker.report.ready and worker.report.model in models:
            models[worker.report.model] += 1
    if not any(models.values()):
        raise NotReady(_why_not(workers, context.catalog))
    return Readiness(models=models)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(
        generate_latest(request.app.state.metrics.registry),
        headers={"Content-Type": CONTENT_TYPE_LATEST},
    )


def _why_not(workers: list[WorkerInfo], catalog: Catalog) -> str:
    reasons = [
        f"worker {worker.id} of {worker.report.model} is {worker.report.state}"
        + (f": {worker.report.error}" if worker.report.error else "")
        for worker in workers
    ]
    if not reasons:
        names = ", ".join(model.name for model in catalog)
        return f"no worker is running for any of: {names}"
    return "no worker is ready; " + "; ".join(reasons)
