"""The main routes of A1111's API: txt2img, sd-models, png-info.

A txt2img is an ordinary job whose request stays open until it's finished.
"""

import base64
import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError

from jobs.errors import Conflict, InvalidRequest, UnknownModel
from jobs.job import ImageView, Job
from jobs.queue.decode import Submitted
from service.context import Context, ServiceContext
from service.http.auth import Caller, CallerByPassword
from service.http.body import json_body, json_body_schema
from service.http.errors import CallerLeft, ImagesFailed, invalid
from service.http.openapi import problems
from service.read.long_poll import enqueue_and_finish
from service.read.results import failure
from service.sdapi.option_routes import model_of
from service.sdapi.pictures import from_base64, settings, texts
from service.sdapi.progress_routes import timestamp
from service.sdapi.schemas import Checkpoint, Pictures, PngInfo, PngToRead, TextToImage
from service.sdapi.sessions import session_of
from service.submit.enqueue import enqueue

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])


@router.post(
    "/txt2img",
    response_model=Pictures,
    responses=problems(400, 404, 408, 409, 413, 415, 422, 429, 502, 503, 504),
    openapi_extra=json_body_schema(TextToImage),
)
async def text_to_image(
    request: Request,
    body: Annotated[TextToImage, Depends(json_body(TextToImage))],
    context: Context,
    caller: CallerByPassword,
) -> Response:
    """Generate images from one prompt; after an interrupt, returns the finished ones."""
    try:
        images_json = await enqueue_and_finish(
            context,
            caller,
            request.receive,
            partial(_enqueue, request, context, caller, body),
            partial(_images_json, context, body),
        )
    except CallerLeft:
        context.sessions.note_departure(session_of(request, caller))
        raise
    return Response(images_json, media_type="application/json")


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


def _enqueue(
    request: Request, context: ServiceContext, caller: Caller, body: TextToImage
) -> tuple[Submitted, str]:
    """The request's job and model; problems refer to the request's fields."""
    try:
        model = model_of(request, context, caller)
        job_body = body.as_job(model, session_of(request, caller))
        job, _ = enqueue(context, caller, job_body)
    except UnknownModel:
        raise
    except ValidationError as error:
        refusal = invalid(error)
    except InvalidRequest as error:
        refusal = error
    else:
        return job, context.catalog.get(job_body.model).name
    raise InvalidRequest(str(refusal), tuple(map(body.field_of, refusal.problems)))


def _images_json(
    context: ServiceContext, body: TextToImage, job: Job, images: Sequence[ImageView]
) -> str:
    problem = failure(images)
    if isinstance(problem, ImagesFailed):
        raise problem
    finished = [image for image in images if image.result]
    if not finished:  # clients take the first image without looking
        raise Conflict("interrupted before an image was finished")
    files = [context.images.read(image.result.uri) for image in finished if image.result]
    encoded = [base64.b64encode(data).decode("ascii") for data in files]
    return Pictures(
        images=[] if body.send_images is False else encoded,
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
        "job_timestamp": timestamp(job),
        "infotexts": [texts(data).get("parameters", "") for data in files],
        "ignored": body.ignored,
        "job": job.id,
    }
