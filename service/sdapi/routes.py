"""The routes of A1111's API: txt2img, progress, interrupt, sd-models, png-info.

A txt2img is an ordinary job whose request stays open until it's finished. `progress` and
`interrupt` apply to the caller's own txt2img jobs, which are recognized by their metadata.
"""

import base64
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ValidationError

from jobs.errors import InvalidRequest, UnknownModel
from jobs.job import ImageView, Job, State
from jobs.queue.decode import Submitted
from service.context import Context, ServiceContext
from service.http.auth import Caller, CallerByPassword
from service.http.body import json_body, json_body_schema
from service.http.errors import ImagesFailed, invalid
from service.http.openapi import problems
from service.read.eta import eta_seconds, speed, work_of_images
from service.read.long_poll import enqueue_and_finish
from service.read.results import failure, preview
from service.sdapi.pictures import from_base64, settings, texts
from service.sdapi.schemas import (
    Checkpoint,
    Pictures,
    PngInfo,
    PngToRead,
    Progress,
    ProgressState,
    TextToImage,
)
from service.submit.enqueue import enqueue

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])


class ProgressQuery(BaseModel):
    """Whether to omit the latest preview."""

    skip_current_image: bool = False


@router.post(
    "/txt2img",
    response_model=Pictures,
    responses=problems(400, 404, 408, 413, 415, 422, 429, 502, 503, 504),
    openapi_extra=json_body_schema(TextToImage),
)
async def text_to_image(
    request: Request,
    body: Annotated[TextToImage, Depends(json_body(TextToImage))],
    context: Context,
    caller: CallerByPassword,
) -> Response:
    """Generate images from one prompt; after an interrupt, returns the finished ones."""
    images_json = await enqueue_and_finish(
        context,
        caller,
        request.receive,
        partial(_enqueue, context, caller, body),
        partial(_images_json, context, body),
    )
    return Response(images_json, media_type="application/json")


@router.get("/progress", response_model=Progress, responses=problems(422, 503))
def progress(
    query: Annotated[ProgressQuery, Query()], context: Context, caller: CallerByPassword
) -> Progress:
    """Progress of the caller's oldest unfinished txt2img."""
    jobs = _unfinished(context, caller)
    if not jobs:
        return _nothing()
    job = jobs[-1]
    images = context.store.images(job.id)
    current = next((image for image in images if image.state is State.RUNNING), images[0])
    rate = speed(context.workers.all(), job.model)
    latest = None if query.skip_current_image else preview(context, job.id, current)
    return Progress(
        progress=job.progress,
        eta_relative=eta_seconds(work_of_images(images), context.store.ahead(job.id), rate) or 0.0,
        state=_state(job, current),
        current_image=base64.b64encode(latest).decode("ascii") if latest else None,
        textinfo=None,
    )


@router.post("/interrupt", responses=problems(422, 503))
def interrupt(context: Context, caller: CallerByPassword) -> dict[str, str]:
    """Stop the caller's unfinished txt2imgs; each returns the images it has so far."""
    for job in _unfinished(context, caller):
        context.store.cancel(job.id, caller.tenant)
    return {}


@router.get("/sd-models", response_model=list[Checkpoint])
def list_checkpoints(context: Context) -> list[Checkpoint]:
    """The catalog's models as checkpoints."""
    return [
        Checkpoint(title=model.name, model_name=model.name, filename=model.path)
        for model in context.catalog
    ]


@router.post(
    "/png-info",
    response_model=PngInfo,
    responses=problems(400, 413, 415, 422),
    openapi_extra=json_body_schema(PngToRead),
)
def read_png(body: Annotated[PngToRead, Depends(json_body(PngToRead))]) -> PngInfo:
    """The generation parameters in an image file."""
    items = texts(from_base64(body.image))
    info = items.pop("parameters", "")
    return PngInfo(info=info, items=dict(items), parameters=settings(info) if info else {})


def _enqueue(context: ServiceContext, caller: Caller, body: TextToImage) -> tuple[Submitted, str]:
    """The request's job and model; problems refer to the request's fields."""
    try:
        job_body = body.as_job(next(iter(context.catalog)).name)
        job, _ = enqueue(context, caller, job_body)
    except UnknownModel:
        raise
    except ValidationError as error:
        refusal = invalid(error)
    except InvalidRequest as error:
        refusal = error
    else:
        return job, job_body.model
    raise InvalidRequest(str(refusal), tuple(map(body.field_of, refusal.problems)))


def _images_json(
    context: ServiceContext, body: TextToImage, job: Job, images: Sequence[ImageView]
) -> str:
    problem = failure(images)
    if isinstance(problem, ImagesFailed):
        raise problem
    finished = [image for image in images if image.result]
    files = [context.images.read(image.result.uri) for image in finished if image.result]
    encoded = [base64.b64encode(data).decode("ascii") for data in files]
    return Pictures(
        images=encoded if body.send_images else [],
        parameters=body.model_dump(mode="json"),
        info=json.dumps(_info(job, images[0], finished, files, body)),
    ).model_dump_json()


def _info(
    job: Job, first: ImageView, finished: list[ImageView], files: list[bytes], body: TextToImage
) -> dict[str, Any]:
    request = first.request
    return {
        "prompt": request.prompt,
        "all_prompts": [image.request.prompt for image in finished],
        "negative_prompt": request.negative_prompt or "",
        "all_negative_prompts": [image.request.negative_prompt or "" for image in finished],
        "seed": request.seed,
        "all_seeds": [image.request.seed for image in finished],
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "cfg_scale": request.guidance_scale,
        "batch_size": len(finished),
        "sd_model_name": job.model,
        "job_timestamp": _timestamp(job),
        "infotexts": [texts(data).get("parameters", "") for data in files],
        "ignored": body.ignored,
        "job": job.id,
    }


def _unfinished(context: ServiceContext, caller: Caller) -> list[Job]:
    """The caller's unfinished txt2imgs, newest first."""
    jobs = [
        job
        for state in (State.QUEUED, State.RUNNING)
        for job in context.store.jobs(caller.tenant, state=state, limit=200)[0]
        if job.metadata.get("api") == "sdapi"
    ]
    return sorted(jobs, key=lambda job: job.created, reverse=True)


def _state(job: Job, current: ImageView) -> ProgressState:
    return ProgressState(
        job=job.id,
        job_count=job.counts.total,
        job_no=current.index,
        job_timestamp=_timestamp(job),
        sampling_step=current.step,
        sampling_steps=current.request.steps,
    )


def _nothing() -> Progress:
    stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime())
    state = ProgressState(
        job="", job_count=0, job_no=0, job_timestamp=stamp, sampling_step=0, sampling_steps=0
    )
    return Progress(progress=0.0, eta_relative=0.0, state=state, current_image=None, textinfo=None)


def _timestamp(job: Job) -> str:
    return datetime.fromtimestamp(job.created, UTC).strftime("%Y%m%d%H%M%S")
