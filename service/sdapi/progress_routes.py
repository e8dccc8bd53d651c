"""A1111's progress, interrupt and skip, for one request where the client sends its id.

They apply to the caller's own txt2img jobs, which are recognized by their metadata.
"""

import base64
import time
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field

from jobs.errors import Conflict
from jobs.job import ImageView, Job, State
from service.context import Context, ServiceContext
from service.http.auth import Caller, CallerByPassword
from service.http.body import json_body, json_body_schema
from service.http.openapi import problems
from service.read.eta import eta_seconds, speed, work_of_images
from service.read.results import preview
from service.sdapi.schemas import Progress, ProgressState, TaskId, TaskProgress, TaskToFollow
from service.sdapi.sessions import session_of

router = APIRouter(tags=["sdapi"])


class ProgressQuery(BaseModel):
    """Which txt2img, and whether to omit the latest preview."""

    skip_current_image: bool = False
    id_task: TaskId | None = None


class TaskQuery(BaseModel):
    """Which txt2img."""

    id_task: Annotated[
        TaskId | None, Field(description="Its `force_task_id`. Default: the one that's running.")
    ] = None


@router.get("/sdapi/v1/progress", response_model=Progress, responses=problems(422, 503))
def progress(
    request: Request,
    query: Annotated[ProgressQuery, Query()],
    context: Context,
    caller: CallerByPassword,
) -> Progress:
    """Progress of the caller's oldest unfinished txt2img, or of the one with `id_task`."""
    jobs = _unfinished(context, caller, query.id_task)
    session = session_of(request, caller)
    own = [job for job in jobs if _is_from(job, session)] or jobs
    if not own:
        return _nothing()
    job = own[-1]
    _images, current, eta = _current(context, job)
    latest = None if query.skip_current_image else preview(context, job.id, current)
    return Progress(
        progress=job.progress,
        eta_relative=eta,
        state=_state(job, current),
        current_image=base64.b64encode(latest).decode("ascii") if latest else None,
        textinfo=None,
    )


@router.post(
    "/internal/progress",
    response_model=TaskProgress,
    responses=problems(400, 413, 415, 422, 503),
    openapi_extra=json_body_schema(TaskToFollow),
)
def task_progress(
    body: Annotated[TaskToFollow, Depends(json_body(TaskToFollow))],
    context: Context,
    caller: CallerByPassword,
) -> TaskProgress:
    """Progress of the txt2img that was sent with this `force_task_id`."""
    jobs = _unfinished(context, caller, body.id_task)
    if not jobs:
        known, _ = context.store.jobs(caller.tenant, limit=_MOST)
        done = any(job.metadata.get("task") == body.id_task for job in known)
        return TaskProgress(active=False, queued=False, completed=done)
    job = jobs[-1]
    _, current, eta = _current(context, job)
    latest = preview(context, job.id, current) if body.live_preview else None
    encoded = base64.b64encode(latest).decode("ascii") if latest else None
    return TaskProgress(
        active=job.state is State.RUNNING,
        queued=job.state is State.QUEUED,
        completed=False,
        progress=job.progress,
        eta=eta,
        live_preview=f"data:image/jpeg;base64,{encoded}" if encoded else None,
        id_live_preview=current.step if encoded else body.id_live_preview,
    )


@router.post("/sdapi/v1/interrupt", responses=problems(422, 503))
def interrupt(
    request: Request,
    query: Annotated[TaskQuery, Query()],
    context: Context,
    caller: CallerByPassword,
) -> dict[str, str]:
    """Stop the caller's running txt2img, which returns the images it has so far."""
    job = _to_stop(request, query, context, caller)
    if job is not None:
        context.store.cancel(job.id, caller.tenant)
    return {}


@router.post("/sdapi/v1/skip", responses=problems(409, 422, 503))
def skip(
    request: Request,
    query: Annotated[TaskQuery, Query()],
    context: Context,
    caller: CallerByPassword,
) -> dict[str, str]:
    """Go on to the next txt2img; 409 if the running one still has several images to make."""
    job = _to_stop(request, query, context, caller)
    if job is not None:
        if job.counts.queued + job.counts.running > 1:
            raise Conflict("one image of several can't be skipped; use interrupt to stop them all")
        context.store.cancel(job.id, caller.tenant)
    return {}


_MOST = 200
"""Newest jobs of a caller that are searched."""


def _to_stop(
    request: Request, query: TaskQuery, context: ServiceContext, caller: Caller
) -> Job | None:
    """The job that an interrupt is for: the one with the id, else the caller's running one.

    None if the caller has no job, or if the job's caller has just disconnected, which has cancelled
    it already.
    """
    session = session_of(request, caller)
    jobs = _unfinished(context, caller, query.id_task)
    if query.id_task is not None:
        return jobs[-1] if jobs else None
    own = [job for job in jobs if _is_from(job, session)]
    if not own or context.sessions.take_departure(session):
        return None
    return next((job for job in reversed(own) if job.state is State.RUNNING), own[-1])


def _is_from(job: Job, session: str) -> bool:
    """Whether the caller sent the job; those of older versions are anyone's."""
    return bool(job.metadata.get("session", session) == session)


def _unfinished(context: ServiceContext, caller: Caller, task: str | None) -> list[Job]:
    """The tenant's unfinished txt2imgs, newest first; only those of a task, if one is given."""
    jobs = [
        job
        for state in (State.QUEUED, State.RUNNING)
        for job in context.store.jobs(caller.tenant, state=state, limit=_MOST)[0]
        if job.metadata.get("api") == "sdapi" and task in (None, job.metadata.get("task"))
    ]
    return sorted(jobs, key=lambda job: job.created, reverse=True)


def _current(context: ServiceContext, job: Job) -> tuple[list[ImageView], ImageView, float]:
    """The job's images, the one that's running, and the seconds left, 0 if unknown."""
    images = context.store.images(job.id)
    current = next((image for image in images if image.state is State.RUNNING), images[0])
    rate = speed(context.workers.all(), job.model)
    eta = eta_seconds(work_of_images(images), context.store.ahead(job.id), rate)
    return images, current, eta or 0.0


def _state(job: Job, current: ImageView) -> ProgressState:
    return ProgressState(
        job=job.id,
        job_count=job.counts.total,
        job_no=current.index,
        job_timestamp=timestamp(job),
        sampling_step=current.step,
        sampling_steps=current.request.steps,
    )


def _nothing() -> Progress:
    stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime())
    state = ProgressState(
        job="", job_count=0, job_no=0, job_timestamp=stamp, sampling_step=0, sampling_steps=0
    )
    return Progress(progress=0.0, eta_relative=0.0, state=state, current_image=None, textinfo=None)


def timestamp(job: Job) -> str:
    """When the job was created, as A1111 writes it."""
    return datetime.fromtimestamp(job.created, UTC).strftime("%Y%m%d%H%M%S")
