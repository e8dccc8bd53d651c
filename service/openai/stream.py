"""A job as OpenAI's stream of image events: previews while it runs, each image once finished.

Workers only draw previews on request; if none arrives in time, no partial image is sent. Produces
the events; the route is elsewhere.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import structlog
from fastapi.sse import format_sse_event

from jobs.errors import ImagemillError, StorageUnavailable
from jobs.job import ImageView
from service.context import ServiceContext
from service.http.auth import Caller
from service.http.errors import GatewayTimeout, NotReady, failure_of, openai_error
from service.openai.schemas import GenerateImages
from service.openai.usage import usage
from service.read.long_poll import RECHECK_SECONDS, cancel_unwanted
from service.read.results import failure, is_over, preview

log = structlog.get_logger(__name__)

_HEARTBEAT = format_sse_event(comment="still here")


@dataclass(slots=True)
class _Sent:
    """What has been sent so far: finished images, and previews by image."""

    images: set[int] = field(default_factory=set)
    previews: dict[int, list[bytes]] = field(default_factory=dict)


async def image_events(
    context: ServiceContext, caller: Caller, job_id: str, body: GenerateImages, *, keep: bool
) -> AsyncIterator[bytes]:
    """Frames until the job is finished. If the reader disconnects, cancels it unless `keep`."""
    sent, done, images = _Sent(), False, list[ImageView]()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + context.settings.sync_seconds
    try:
        with context.hub.watch(job_id) as watch:
            while True:
                frames: list[bytes] = []
                try:
                    images, frames, sent = await anyio.to_thread.run_sync(
                        _news, context, caller, job_id, body, sent
                    )
                    done = is_over(images)
                except StorageUnavailable as error:  # the queue may be back before the deadline
                    log.info("image stream waits for the queue", job=job_id, error=str(error))
                for frame in frames:
                    yield frame
                if done:
                    break
                reason = await anyio.to_thread.run_sync(_standstill, context, images)
                if reason is not None:
                    raise NotReady(reason)
                if context.hub.closing or loop.time() > deadline:
                    raise GatewayTimeout("the images were not finished in time")
                if not await watch.news_within(RECHECK_SECONDS):
                    yield _HEARTBEAT
        if problem := failure(images):
            raise problem
    except ImagemillError as error:
        yield format_sse_event(
            event="error", data_str=json.dumps({"error": openai_error(failure_of(error))})
        )
    finally:
        if not done and not keep:
            with anyio.CancelScope(shield=True):
                await cancel_unwanted(context, caller, job_id, deadline)


def _standstill(context: ServiceContext, images: list[ImageView]) -> str | None:
    """Why no worker can generate the images; None if one can, or if the queue is unreachable."""
    with suppress(StorageUnavailable):
        return context.standstill(images[0].request.model) if images else None
    return None


def _news(
    context: ServiceContext, caller: Caller, job_id: str, body: GenerateImages, sent: _Sent
) -> tuple[list[ImageView], list[bytes], _Sent]:
    """The job's images, the frames that haven't been sent yet, and `sent` including those.

    `sent` itself isn't modified, because no frame is sent if the queue fails halfway.
    """
    context.store.job(job_id, caller.tenant)
    images, after = context.store.images(job_id), deepcopy(sent)
    frames = [frame for image in images for frame in _frames(context, job_id, image, body, after)]
    return images, frames, after


def _frames(
    context: ServiceContext, job_id: str, image: ImageView, body: GenerateImages, sent: _Sent
) -> Iterator[bytes]:
    if image.index in sent.images:
        return
    if image.result is not None:
        sent.images.add(image.index)
        data = context.images.read(image.result.uri)
        used = usage(context, [image])
        fields = {"usage": used.model_dump()} if used else {}
        yield _frame("completed", image, data, image.request.format, fields)
        return
    previews = sent.previews.setdefault(image.index, [])
    if len(previews) < (body.partial_images or 0):
        latest = preview(context, job_id, image)
        if latest is not None and latest not in previews:
            previews.append(latest)
            number = {"partial_image_index": len(previews) - 1}
            yield _frame("partial_image", image, latest, "jpeg", number)


def _frame(
    kind: str, image: ImageView, data: bytes, output_format: str, more: dict[str, Any]
) -> bytes:
    name = f"image_generation.{kind}"
    event = {
        "type": name,
        "b64_json": base64.b64encode(data).decode("ascii"),
        "created_at": int(time.time()),
        "size": f"{image.request.width}x{image.request.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": output_format,
        "index": image.index,
        "seed": image.request.seed,
        **more,
    }
    return format_sse_event(event=name, data_str=json.dumps(event))
