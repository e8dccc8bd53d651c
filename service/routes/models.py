"""The catalog's models, and the workers that run them."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from jobs.catalog import Model
from jobs.defaults import as_published
from jobs.queue.decode import WorkerInfo
from service.context import Context, ServiceContext
from service.http.openapi import problems
from service.submit.schemas import ModelList, ModelView, WorkerList, WorkerView

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelList, responses=problems(422, 503))
@router.head("/v1/models", include_in_schema=False)
def list_models(context: Context) -> ModelList:
    """The catalog, in the format of OpenAI's model list."""
    ready, queued = _ready(context), _queued(context)
    return ModelList(data=[_view(context, model, ready, queued) for model in context.catalog])


@router.get("/v1/models/{name}", response_model=ModelView, responses=problems(404, 422, 503))
def get_model(name: str, context: Context) -> ModelView:
    """One model of the catalog."""
    return _view(context, context.catalog.get(name), _ready(context), _queued(context))


@router.get("/v1/workers", response_model=WorkerList, responses=problems(422, 503))
def list_workers(context: Context) -> WorkerList:
    """Each worker's last report: its model, state, device and speed."""
    return WorkerList(data=[_worker(worker) for worker in context.store.workers()])


def _worker(worker: WorkerInfo) -> WorkerView:
    report = worker.report
    facts = {**report.to_dict(), "id": worker.id, "model": report.model, "state": report.state}
    return WorkerView(**facts)


def _view(
    context: ServiceContext, model: Model, ready: Counter[str], queued: Counter[str]
) -> ModelView:
    card = context.store.card(model.name)
    model = as_published(model, card)
    return ModelView(
        id=model.name,
        created=context.started,
        owned_by="imagemill",
        dtype=model.dtype,
        placement=model.placement,
        defaults={**asdict(model.defaults), **dict.fromkeys(model.unset)},
        limits=_limits(model),
        card=card.to_dict() if card else None,
        ready_workers=ready[model.name],
        queued=queued[model.name],
    )


def _limits(model: Model) -> dict[str, Any]:
    sizes = [f"{width}x{height}" for width, height in model.limits.sizes]
    return {**asdict(model.limits), "sizes": sizes}


def _ready(context: ServiceContext) -> Counter[str]:
    workers = context.store.workers()
    return Counter(
        worker.report.model for worker in workers if worker.report.ready and worker.report.model
    )


def _queued(context: ServiceContext) -> Counter[str]:
    depth = context.store.queue_depth()
    return Counter({model: sum(bands.values()) for model, bands in depth.items()})
