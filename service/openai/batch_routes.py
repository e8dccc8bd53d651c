"""Routes of OpenAI Batches: a file of image requests in, a file of their outcomes out."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from service.context import Context
from service.http.auth import AnyCaller
from service.http.body import json_body, json_body_schema
from service.http.openapi import openai_errors
from service.openai import batches
from service.openai.batch_schemas import BatchList, BatchView, CreateBatch
from service.openai.file_routes import page_of
from service.submit.enqueue import IdempotencyKey

router = APIRouter(tags=["openai"])


class BatchPage(BaseModel):
    """Query of the batch list."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: Annotated[str | None, Field(max_length=80, description="The last id seen.")] = None


@router.post(
    "/v1/batches",
    response_model=BatchView,
    responses=openai_errors(400, 404, 413, 415, 429, 503),
    openapi_extra=json_body_schema(CreateBatch),
)
def create_batch(
    request: Request,
    body: Annotated[CreateBatch, Depends(json_body(CreateBatch))],
    context: Context,
    caller: AnyCaller,
    idempotency_key: IdempotencyKey = None,
) -> BatchView:
    """Queue every line of an uploaded file, after answering; an invalid line only fails itself."""
    base = context.links.base or str(request.base_url).rstrip("/")
    return batches.begin(context, caller, body, base, idempotency_key)


@router.get("/v1/batches", response_model=BatchList, responses=openai_errors(400, 503))
def list_batches(
    query: Annotated[BatchPage, Query()], context: Context, caller: AnyCaller
) -> BatchList:
    """The caller's batches, newest first, a page at a time."""
    ids = [document["id"] for document in context.batches.all(caller.tenant)]
    page, has_more = page_of(ids, query.after, query.limit)
    views = [batches.look(context, caller, batch_id) for batch_id in ids if batch_id in page]
    return BatchList(
        data=views,
        has_more=has_more,
        first_id=views[0].id if views else None,
        last_id=views[-1].id if views else None,
    )


@router.get("/v1/batches/{batch_id}", response_model=BatchView, responses=openai_errors(404, 503))
def get_batch(batch_id: str, context: Context, caller: AnyCaller) -> BatchView:
    """The batch's current state."""
    return batches.look(context, caller, batch_id)


@router.post(
    "/v1/batches/{batch_id}/cancel", response_model=BatchView, responses=openai_errors(404, 503)
)
def cancel_batch(batch_id: str, context: Context, caller: AnyCaller) -> BatchView:
    """Cancel a batch; finished lines are kept."""
    return batches.cancel(context, caller, batch_id)
