"""A job's events as a stream of Server-Sent Events, which a reader can leave and resume.

A frame's id is its position in the queue's event stream, so `Last-Event-ID` says exactly what the
reader has seen. A frame's content is the state when it's sent. A new reader first gets the job's
current state, then all its events. The queue keeps the last 100,000 events of all jobs; older ones
are only reflected in that first frame. A reader that resumes from an event that's no longer kept
starts over. The stream ends when the job does, or if the reader is too slow, so it can resume.
Produces the frames; the route is elsewhere.
"""

import math
from collections.abc import AsyncIterator, Sequence

import anyio.to_thread
import structlog
from fastapi.sse import format_sse_event

from jobs.errors import NotFound, StorageUnavailable
from jobs.job import FINISHED, ImageView, Job
from jobs.queue.decode import Event
from service.context import ServiceContext
from service.http.auth import Caller
from service.read.events import Watch, place
from service.read.views import image_item, job_summary
from service.submit.schemas import JobEvent

log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 15.0
HEARTBEAT = format_sse_event(comment="still here")
MAX_UNREAD = 5000
"""Events buffered for a slow reader before its stream is ended."""

_IMAGE_EVENTS = ("image", "image_failed")
_FEW = 50
"""Up to this many images are read one by one; beyond it, all of the job's images at once."""


async def job_frames(
    context: ServiceContext, caller: Caller, job_id: str, after: str | None
) -> AsyncIterator[bytes]:
    """The frames after the event id `after`, or all of them.

    There are none if the job is finished and the reader has seen all of them. Raises NotFound
    before the first frame, and nothing after it: the stream ends instead.
    """
    with context.hub.watch(job_id, keep=MAX_UNREAD) as watch:
        job = await anyio.to_thread.run_sync(context.store.job, job_id, caller.tenant)
        start, is_fresh = await anyio.to_thread.run_sync(_begin, context, job, after)
        if is_fresh:
            yield await anyio.to_thread.run_sync(_job_frame, context, job, start)
        elif not job.state.finished:
            yield HEARTBEAT
        try:
            async for frames in _batches(context, caller, job, start, watch):
                for frame in frames:
                    yield frame
        except StorageUnavailable as error:
            log.warning("event stream of a job ends early", job=job_id, error=str(error))


def _begin(context: ServiceContext, job: Job, after: str | None) -> tuple[str, bool]:
    """The event id to read from, and whether to send the job's current state first.

    The state is sent to new readers, and to those who may have missed events that the queue no
    longer keeps. If no events of a finished job are left, that frame gets an id after the job's
    end, so that a reader who resumes from it has seen everything.
    """
    stored = context.store.events("0-0", 0)
    oldest = place(stored[0].id)[0] if stored else math.inf
    begun = round(job.created * 1000)
    ended = math.inf if job.finished is None else round(job.finished * 1000)
    if after is not None:
        has_seen_the_end = place(after)[0] > ended
        if oldest <= begun or (stored and place(after) >= place(stored[0].id)) or has_seen_the_end:
            return after, False
    return (f"{ended + 1}-0" if ended < oldest else f"{begun - 1}-0"), True


async def _batches(
    context: ServiceContext, caller: Caller, job: Job, after: str, watch: Watch
) -> AsyncIterator[list[bytes]]:
    """Frames of the job's stored events after `after`, then of new ones, until the job ends."""
    # First catch up from the queue, page by page; a page has the events of all jobs. The watch was
    # started before that, so it buffers what happens meanwhile. A job that is already finished has
    # no more events to wait for, even if the queue no longer keeps its end.
    is_over = job.state.finished
    while page := await anyio.to_thread.run_sync(context.store.events, after, 0):
        after = page[-1].id
        own = [event for event in page if event.job_id == job.id]
        frames, ended = await anyio.to_thread.run_sync(_frames, context, caller, job.id, own)
        is_over = is_over or ended
        yield frames
    # Then follow the watch. After an overflow, its buffer has a gap, so the stream ends and the
    # reader resumes from the queue with its last id.
    while not (is_over or context.hub.closing or watch.overflowed):
        # The buffer also has events that were already sent from the queue.
        news = [event for event in watch.take() if place(event.id) > place(after)]
        if news:
            after = news[-1].id
            frames, is_over = await anyio.to_thread.run_sync(_frames, context, caller, job.id, news)
            yield frames
        elif not await watch.news_within(HEARTBEAT_SECONDS):
            yield [HEARTBEAT]


def _frames(
    context: ServiceContext, caller: Caller, job_id: str, events: Sequence[Event]
) -> tuple[list[bytes], bool]:
    """Frames of these events, and whether they include the job's end.

    Of the events about the whole job, only the last becomes a frame, because all would have the
    same content.
    """
    if not events:
        return [], False
    try:
        job = context.store.job(job_id, caller.tenant)
        images = _images(context, job_id, events)
    except NotFound:
        return [_frame("deleted", f'{{"id":"{job_id}"}}', events[-1].id)], True
    whole = [event for event in events if event.type not in _IMAGE_EVENTS]
    frames = []
    for event in events:
        if event.index is not None and event.type in _IMAGE_EVENTS:
            item = image_item(job_id, images[event.index], context.links)
            frames.append(_frame("image", item.model_dump_json(), event.id))
        elif event is whole[-1]:
            frames.append(_job_frame(context, job, event.id))
    return frames, job.state.finished and any(event.type in FINISHED for event in whole)


def _images(context: ServiceContext, job_id: str, events: Sequence[Event]) -> dict[int, ImageView]:
    """The images that the events refer to, by index."""
    indexes = {event.index for event in events if event.type in _IMAGE_EVENTS}
    if len(indexes) > _FEW:
        return {image.index: image for image in context.store.images(job_id)}
    return {index: context.store.image(job_id, index) for index in indexes if index is not None}


def _job_frame(context: ServiceContext, job: Job, event_id: str) -> bytes:
    summary = job_summary(job, context.links)
    event = JobEvent(**dict(summary), queue_position=context.store.position(job.id))
    return _frame("job", event.model_dump_json(), event_id)


def _frame(kind: str, data: str, event_id: str) -> bytes:
    return format_sse_event(event=kind, data_str=data, id=event_id)
