"""Waits for a job without holding a thread.

Depends on the hub and the store, but not on any route.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import anyio.to_thread
import structlog
from starlette.types import Receive

from jobs.errors import NotFound, StorageUnavailable
from jobs.job import ImageView, Job
from jobs.queue.decode import Submitted
from service.context import ServiceContext
from service.http.auth import Caller
from service.http.errors import CallerLeft, GatewayTimeout, NotReady
from service.read.events import Watch

log = structlog.get_logger(__name__)

RECHECK_SECONDS = 2.0
"""A waiting request reads its job at least this often, because the queue thins out progress events.
"""

_RARELY = 5
"""A request that only waits for the job's end checks this many times less often whether the model
still has a worker."""

_LOST_END = 3
"""Every this many checks it also reads the job, in case the stream lost the end's event."""

_GATHER_SECONDS = 1e-4
"""Pause per image before a changed job is read again, because reading a large job is expensive."""


async def wait_for_job(
    context: ServiceContext,
    caller: Caller,
    job_id: str,
    enough: Callable[[Job], bool],
    seconds: float,
) -> Job:
    """The job, once it's `enough`, or after `seconds`, or when the service is stopping."""
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


async def enqueue_and_finish(
    context: ServiceContext,
    caller: Caller,
    receive: Receive,
    enqueue: Callable[[], tuple[Submitted, str]],
    answer: Callable[[Job, list[ImageView]], str],
    *,
    keep: bool = False,
) -> str:
    """Queue a job, wait for it, and return `answer(job, images)`.

    `enqueue` returns the job and its model. Both are called on a thread. `receive` is the
    request's. Its body has been read, so its next message is the disconnect. An unreachable queue
    is waited for, because a caller who gets a 503 would retry and queue another job. If the caller
    disconnects, or after `sync_seconds`, or if no worker of the model can start, the job is
    cancelled, because its images would never be fetched; `keep` keeps it, because the caller can
    retry. Raises CallerLeft, GatewayTimeout, NotReady, and what `enqueue` raises.
    """
    loop = asyncio.get_running_loop()
    submitted, model, reason = await anyio.to_thread.run_sync(_begin, context, enqueue)
    job_id, patience = submitted.job_id, context.settings.sync_seconds
    deadline = loop.time() + patience

    def finished() -> str | None:
        job, images = context.store.job_and_images(job_id, caller.tenant)
        return answer(job, images) if job.state.finished else None

    with context.hub.watch(job_id, ends_only=True) as watch, _departure(receive, watch) as has_left:
        # A job that this request has just queued can't be finished yet, so its first read is
        # skipped: the hub remembers recent ends and wakes the watch if the job is that fast.
        checks, may_be_over = 0, not submitted.created
        while True:
            trouble, pause = "", RECHECK_SECONDS * _RARELY
            try:
                if may_be_over:
                    response = await anyio.to_thread.run_sync(finished)
                    if response is not None:
                        return response
                if checks:
                    reason = await anyio.to_thread.run_sync(context.standstill, model)
                if reason is not None:
                    await _refuse(context, caller, job_id, reason, deadline, keep=keep)
            except StorageUnavailable as error:
                # Keep waiting, but check more often, to notice soon when the queue is back. If it
                # isn't back in time, the timeout's message includes the reason.
                trouble, pause = f": {error}", RECHECK_SECONDS
            left = deadline - loop.time()
            is_gone = has_left()
            # Checked after the read, so a job that finished at the last moment is still returned.
            if is_gone or left <= 0 or context.hub.closing:
                if not keep:
                    await cancel_unwanted(context, caller, job_id, deadline)
                if is_gone:
                    raise CallerLeft("the caller disconnected")
                raise GatewayTimeout(
                    f"the images were not finished within {patience:g} seconds{trouble}"
                )
            has_news = await watch.news_within(min(left, pause))
            checks += 1
            may_be_over = has_news or trouble != "" or pause >= left or checks % _LOST_END == 0


def _begin(
    context: ServiceContext, enqueue: Callable[[], tuple[Submitted, str]]
) -> tuple[Submitted, str, str | None]:
    """Queue the job; return it, its model, and why no worker can run it, if that's known.

    One call for both, because each switch to a thread costs as much as a read of the queue.
    """
    submitted, model = enqueue()
    reason = None
    with suppress(StorageUnavailable):  # the job is queued now, so its request waits
        reason = context.standstill(model)
    return submitted, model, reason


@contextmanager
def _departure(receive: Receive, watch: Watch) -> Iterator[Callable[[], bool]]:
    """Wakes the watch when the caller disconnects; yields a function that says whether it has."""

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
    """Raise NotReady before a stream starts, if no worker of the model can generate its images.

    An unreachable queue is ignored, because the stream waits for it.
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
    """Raise NotReady with the reason, after cancelling the job unless `keep`."""
    if not keep:
        await cancel_unwanted(context, caller, job_id, deadline)
    raise NotReady(reason)


async def cancel_unwanted(
    context: ServiceContext, caller: Caller, job_id: str, deadline: float
) -> None:
    """Cancel a job whose images won't be fetched; it may have been deleted already.

    Retries while the queue is unreachable, until `deadline` (event loop time). After that, it only
    logs a warning, because the caller couldn't do anything about an error.
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
