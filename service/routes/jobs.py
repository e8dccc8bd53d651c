"""Jobs: submit, get (and wait for changes), list, cancel, retry, delete.

A POST is validated in this order: `service/submit/schemas.py` (types, and bounds that apply to
every model), the catalog (the model's limits), the card (what the loaded model supports); the
latter two in `service/submit/submission.py`. Nothing is queued if anything is invalid.
"""

import zlib
from collections.abc import Sequence
from typing import Annotated, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from jobs.job import ImageView, Job, State
from jobs.queue.decode import Ahead
from jobs.queue.reader import CURSOR
from service.context import Context, ServiceContext
from service.http.auth import AnyCaller, Caller
from service.http.body import json_body, json_body_schema
from service.http.conditional import tags
from service.http.openapi import NOT_MODIFIED, problems
from service.read.eta import eta_seconds, speed, work_of_counts, work_of_images
from service.read.long_poll import wait_for_job
from service.read.views import job_summary, job_view
from service.submit.enqueue import IdempotencyKey, enqueue
from service.submit.schemas import JobPage, JobView, SubmitJob

router = APIRouter(tags=["jobs"])


class Look(BaseModel):
    """How long to wait for a change, and whether to include the images."""

    model_config = ConfigDict(extra="forbid")

    wait: Annotated[
        float,
        Field(
            ge=0,
            le=60,
            allow_inf_nan=False,
            description="Seconds to wait for a change (with If-None-Match) or for the end of the "
            "job (without).",
        ),
    ] = 0
    images: Annotated[
        Literal["all", "none"], Field(description="Whether to include the list of images.")
    ] = "all"


class Listing(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    state: State | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[
        str | None, Field(pattern=CURSOR, description="`next` of the previous page.")
    ] = None


@router.post(
    "/v1/jobs",
    status_code=202,
    response_model=JobView,
    responses=problems(400, 404, 413, 415, 422, 429, 503),
    openapi_extra=json_body_schema(SubmitJob),
)
def submit_job(
    body: Annotated[SubmitJob, Depends(json_body(SubmitJob))],
    context: Context,
    caller: AnyCaller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a batch of prompts. Responds immediately; nothing is queued if any field is invalid."""
    job, notes = enqueue(context, caller, body, idempotency_key)
    response = _job_response(
        context, *context.store.snapshot(job.job_id, caller.tenant, images=True), 202, notes
    )
    response.headers["Location"] = context.links.job(job.job_id)
    response.headers["Retry-After"] = "1"
    return response


@router.get(
    "/v1/jobs/{job_id}",
    response_model=JobView,
    responses=NOT_MODIFIED | problems(404, 422, 503),
)
@router.head("/v1/jobs/{job_id}", response_model=JobView, include_in_schema=False)
async def get_job(
    job_id: str,
    query: Annotated[Look, Query()],
    context: Context,
    caller: AnyCaller,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The job's current state, optionally after waiting for a change. The ETag changes with it."""
    known = tags(if_none_match)
    versions = {tag.rpartition(".")[0] for tag in known}
    if query.wait:
        await wait_for_job(
            context,
            caller,
            job_id,
            lambda job: job.version not in versions if versions else job.state.finished,
            query.wait,
        )
    with_images = query.images == "all"
    return await anyio.to_thread.run_sync(
        _unless_known, context, caller, job_id, known, with_images
    )


@router.get("/v1/jobs", response_model=JobPage, responses=problems(422, 503))
def list_jobs(query: Annotated[Listing, Query()], context: Context, caller: AnyCaller) -> JobPage:
    """The caller's jobs, newest first, a page at a time."""
    jobs, following = context.store.jobs(
        caller.tenant, state=query.state, cursor=query.cursor, limit=query.limit
    )
    return JobPage(data=[job_summary(job, context.links) for job in jobs], next=following)


@router.post("/v1/jobs/{job_id}/cancel", response_model=JobView, responses=problems(404, 422, 503))
def cancel_job(job_id: str, context: Context, caller: AnyCaller) -> Response:
    """Cancel unfinished images; finished ones are kept. A running image stops at its next step."""
    context.store.cancel(job_id, caller.tenant)
    return _job_response(context, *context.store.snapshot(job_id, caller.tenant, images=True))


@router.post(
    "/v1/jobs/{job_id}/retry",
    status_code=202,
    response_model=JobView,
    responses=problems(404, 409, 422, 503),
)
def retry_job(job_id: str, context: Context, caller: AnyCaller) -> Response:
    """Run the failed and cancelled images again; 409 if there are none."""
    context.store.retry(job_id, caller.tenant)
    return _job_response(context, *context.store.snapshot(job_id, caller.tenant, images=True), 202)


@router.delete("/v1/jobs/{job_id}", status_code=204, responses=problems(404, 422, 503))
def delete_job(job_id: str, context: Context, caller: AnyCaller) -> Response:
    """Delete the job and its files; running images are stopped."""
    context.store.delete(job_id, caller.tenant)
    return Response(status_code=204)


def _unless_known(
    context: ServiceContext, caller: Caller, job_id: str, known: list[str], with_images: bool
) -> Response:
    """The job, or 304 if the caller's ETag is current; read atomically."""
    # With an ETag the response is probably a 304, so the images are only read if it isn't.
    reads_images = with_images and not known
    job, images, ahead = context.store.snapshot(job_id, caller.tenant, images=reads_images)
    tag = _tag(job, ahead, _trouble(context, job))
    if tag in known or known == ["*"]:
        return Response(status_code=304, headers={"ETag": f'W/"{tag}"'})
    if with_images and not reads_images:
        job, images, ahead = context.store.snapshot(job_id, caller.tenant, images=True)
    return _job_response(context, job, images, ahead)


def _tag(job: Job, ahead: Ahead | None, trouble: str | None) -> str:
    """An entity tag that changes whenever the response does."""
    digest = f"-{zlib.crc32(trouble.encode()):08x}" if trouble else ""
    return f"{job.version}.{ahead.next if ahead else None}{digest}"


def _trouble(context: ServiceContext, job: Job) -> str | None:
    """Why no worker can run an unfinished job, if so."""
    return None if job.state.finished else context.standstill(job.model)


def _job_response(
    context: ServiceContext,
    job: Job,
    images: list[ImageView],
    ahead: Ahead | None,
    status: int = 200,
    notes: Sequence[str] = (),
) -> Response:
    """The job as JSON, serialized on the calling thread."""
    work = work_of_images(images) if images else work_of_counts(job)
    eta = eta_seconds(work, ahead, speed(context.workers.all(), job.model))
    position = ahead.next if ahead else None
    trouble = _trouble(context, job)
    notes = [*notes, trouble] if trouble else notes
    view = job_view(job, images, context.links, position=position, eta=eta, warnings=notes)
    return Response(
        view.model_dump_json(),
        status_code=status,
        media_type="application/json",
        headers={"ETag": f'W/"{_tag(job, ahead, trouble)}"', "Cache-Control": "no-cache"},
    )
