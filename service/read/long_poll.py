"""Waiting for a job without holding a thread.

Knows the hub and the store; knows no route.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import anyio.to_thread
import structlog
from starlette.types import Receive

from jobs.errors import NotFound, StorageUnavailable
from jobs.job import Job
from service.context import ServiceContext
from service.http.auth import Caller
from service.http.errors import CallerLeft, NotReady, TookTooLong
from service.read.events import Watch

log = structlog.get_logger(__name__)

RECHECK_SECONDS = 2.0
"""A waiting request looks at its job at least this often: the queue thins out progress events."""

_RARELY = 5
"""A request that waits for the end alone looks this many times less often: an end is always told,
so a look only guards against a stream that lost it."""

_GATHER_SECONDS = 1e-4
"""News of a job are gathered for so long per image, since telling of a large one is work."""


async def wait_for_job(
    context: ServiceContext,
    caller: Caller,
    job_id: str,
    enough: Callable[[Job], bool],
    seconds: float,
) -> Job:
    """The job, once it is `enough`, or `seconds` have passed, or the service is stopping."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    with context.hub.watch(job_id) as watch:
        while True:
            job = await anyio.to_thread.run_sync(context.store.job, job_id, caller.tenant)
            left = deadline - loop.time()
            if enough(job) or left <= 0 or context.hub.closing:
                return job
            if await watch.news_within(min(left, RECHECK_SECONDS)):
                await asyncio.sleep(job.counts.total * _GATHER_SECONDS)


async def finish_or_cancel(
    context: ServiceContext,
    caller: Caller,
    job_id: str,
    receive: Receive,
    answer: Callable[[Job], str],
    *,
    model: str,
    created: bool,
    keep: bool = False,
) -> str:
    """What `answer`, on a thread, makes of the finished job, for a caller that waits on the line.

    `receive` is the request's, whose body has been read: the next message says that the caller
    left. `created` says that this request queued the job, so that the hub knows if it is over.
    While the queue is away it is waited for: a caller who is sent off with a 503 comes again, and
    makes another job. When the caller has left, or the settings' patience is at its end, the job
    is cancelled, since nobody would ever fetch it; unless `keep` says that the caller will come
    again. The same where the model's workers can't start, however long anyone waits. Raises
    CallerLeft, TookTooLong, NotReady.
    """
    loop = asyncio.get_running_loop()
    patience = context.settings.sync_seconds
    deadline = loop.time() + patience

    def look() -> str | None:
        job = context.store.job(job_id, caller.tenant)
        return answer(job) if job.state.finished else None

    with context.hub.watch(job_id, ends_only=True) as watch, _departure(receive, watch) as has_left:
        trouble, may_be_over = "", not created
        while True:
            pause = RECHECK_SECONDS * _RARELY
            try:
                if may_be_over:
                    trouble = ""
                    response = await anyio.to_thread.run_sync(look)
                    if response is not None:
                        return response
                reason = await anyio.to_thread.run_sync(context.standstill, model)
                if reason is not None:
                    await _refuse(context, caller, job_id, reason, deadline, keep=keep)
            except StorageUnavailable as error:
                trouble, pause = f": {error}", RECHECK_SECONDS
            left = deadline - loop.time()
            gone = has_left()
            if gone or left <= 0 or context.hub.closing:
                if not keep:
                    await cancel_unwanted(context, caller, job_id, deadline)
                raise (
                    CallerLeft("the caller left")
                    if gone
                    else TookTooLong(
                        f"the images were not made within {patience:g} seconds{trouble}"
                    )
                )
            await watch.news_within(min(left, pause))
            may_be_over = True


@contextmanager
def _departure(receive: Receive, watch: Watch) -> Iterator[Callable[[], bool]]:
    """Wakes the watch when the caller leaves; yields whether the caller has."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        watch.wake()

    waiting = asyncio.create_task(wait())
    try:
        yield waiting.done
    finally:
        waiting.cancel()


async def refuse_to_stream(
    context: ServiceContext, caller: Caller, job_id: str, model: str, *, keep: bool
) -> None:
    """As `finish_or_cancel` refuses a job that stands still, before a stream has begun.

    A queue that is away is left to the stream, which waits for it.
    """
    deadline = asyncio.get_running_loop().time() + context.settings.sync_seconds
    reason: str | None = None
    with suppress(StorageUnavailable):
        reason = await anyio.to_thread.run_sync(context.standstill, model)
    if reason is not None:
        await _refuse(context, caller, job_id, reason, deadline, keep=keep)


async def _refuse(
    context: ServiceContext,
    caller: Caller,
    job_id: str,
    reason: str,
    deadline: float,
    *,
    keep: bool,
) -> None:
    """Raise NotReady with the reason; the job is cancelled before unless `keep`."""
    if not keep:
        await cancel_unwanted(context, caller, job_id, deadline)
    raise NotReady(reason)


async def cancel_unwanted(
    context: ServiceContext, caller: Caller, job_id: str, deadline: float
) -> None:
    """Cancel a job that nobody will fetch, or that is gone by now.

    While the queue is away it is tried again until `deadline`, a time of the event loop; a job that
    outlives that is told in the log, and raises nothing: its caller could do nothing about it.
    """
    while True:
        try:
            await anyio.to_thread.run_sync(context.store.cancel, job_id, caller.tenant)
            return
        except NotFound:
            return
        except StorageUnavailable as error:
            if context.hub.closing or asyncio.get_running_loop().time() >= deadline:
                log.warning("a job that nobody waits for goes on", job=job_id, error=str(error))
                return
        await asyncio.sleep(RECHECK_SECONDS)
