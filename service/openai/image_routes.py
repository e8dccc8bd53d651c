"""Routes of OpenAI's Images API: one prompt in, images out as one response or a stream of events.

The images are an ordinary job, which is cancelled when the caller disconnects, unless the request
has an Idempotency-Key, so that the caller can retry.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from jobs.errors import InvalidRequest, UnknownModel
from jobs.job import ImageView, Job
from jobs.queue.decode import Submitted
from service.context import Context, ServiceContext
from service.http.auth import AnyCaller, Caller
from service.http.body import json_body, json_body_schema
from service.http.errors import invalid
from service.http.openapi import Responses, event_stream, openai_errors
from service.openai.answers import generated
from service.openai.engine_fields import as_served
from service.openai.schemas import GeneratedImages, GenerateImages
from service.openai.stream import image_events
from service.openai.usage import usage
from service.read.long_poll import enqueue_and_finish, refuse_to_stream
from service.read.results import failure
from service.read.views import Links
from service.submit.enqueue import IdempotencyKey, enqueue

router = APIRouter(tags=["openai"])

_IMAGES: Responses = {
    200: {
        "description": "The images; with `stream`, events image_generation.partial_image and "
        "image_generation.completed.",
        "content": event_stream(
            "image_generation.partial_image", "image_generation.completed", "error"
        ),
    }
}


@router.post(
    "/v1/images/generations",
    response_model=GeneratedImages,
    responses=_IMAGES | openai_errors(400, 404, 408, 409, 413, 415, 429, 502, 503, 504),
    openapi_extra=json_body_schema(GenerateImages),
)
async def generate_images(
    request: Request,
    body: Annotated[GenerateImages, Depends(json_body(GenerateImages))],
    context: Context,
    caller: AnyCaller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Generate images from one prompt."""
    keep = idempotency_key is not None
    queue = partial(_enqueue, context, caller, body, idempotency_key)
    if body.stream:
        job, model = await anyio.to_thread.run_sync(queue)
        await refuse_to_stream(context, caller, job.job_id, model, keep=keep)
        frames = image_events(context, caller, job.job_id, body, keep=keep)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(frames, media_type="text/event-stream", headers=headers)
    links = context.links.at(context.links.base or str(request.base_url).rstrip("/"))
    images_json = await enqueue_and_finish(
        context,
        caller,
        request.receive,
        queue,
        partial(_images_json, context, body, links),
        keep=keep,
    )
    return Response(images_json, media_type="application/json")


def _enqueue(
    context: ServiceContext, caller: Caller, body: GenerateImages, key: str | None
) -> tuple[Submitted, str]:
    """The request's job and model; problems refer to the request's fields."""
    first = next(iter(context.catalog)).name
    try:
        model = context.catalog.get(body.model or first)
        job_body = as_served(body, context.cards.of(model.name)).as_job(model.name)
        job, _ = enqueue(context, caller, job_body, key)
    except UnknownModel:
        raise
    except ValidationError as error:
        refusal = invalid(error)
    except InvalidRequest as error:
        refusal = error
    else:
        return job, model.name
    raise InvalidRequest(str(refusal), tuple(map(body.field_of, refusal.problems)))


def _images_json(
    context: ServiceContext,
    body: GenerateImages,
    links: Links,
    job: Job,
    images: Sequence[ImageView],
) -> str:
    """The finished job in OpenAI's format. Raises an error if it didn't succeed."""
    problem = failure(images)
    if problem is not None:
        raise problem
    response = generated(
        context.images, links, job.id, images, body.response_format, usage(context, images)
    )
    return response.model_copy(update={"warnings": body.warnings}).model_dump_json()
