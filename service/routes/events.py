"""The stream of a job's events (Server-Sent Events)."""

import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse
from pydantic import WithJsonSchema

from service.context import Context
from service.http.auth import AnyCaller
from service.http.errors import MalformedHeader
from service.http.openapi import Responses, event_stream, problems
from service.read.job_stream import job_frames

router = APIRouter(tags=["jobs"])

_EVENT_ID = r"^[0-9]{1,15}-[0-9]{1,15}$"
_RESPONSES: Responses = {
    200: {
        "description": "`job` events (the job without its images), `image` events (an image that "
        "is finished or has failed), `deleted` events, and comments as heartbeats.",
        "content": event_stream("job", "image", "deleted"),
    },
    204: {"description": "The job is finished and the reader has seen all of its events."},
}


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=Response,
    responses=_RESPONSES | problems(400, 404, 422, 503),
)
async def follow_job(
    job_id: str,
    context: Context,
    caller: AnyCaller,
    last_event_id: Annotated[
        str | None,
        WithJsonSchema({"type": "string", "pattern": _EVENT_ID}),
        Header(description="Id of the last event seen, to resume after it."),
    ] = None,
) -> Response:
    """A job's events as they happen; the stream ends when the job does."""
    if last_event_id is not None and not re.fullmatch(_EVENT_ID, last_event_id):
        raise MalformedHeader("Last-Event-ID must be the id of an event of this stream")
    frames = job_frames(context, caller, job_id, last_event_id)
    first = await anext(frames, None)
    if first is None:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_from(first, frames), media_type="text/event-stream", headers=headers)


async def _from(first: bytes, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for frame in frames:
        yield frame
