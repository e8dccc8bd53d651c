"""Waiting for a job without holding a thread.

Knows the hub and the store; knows no route.
"""

import asyncio
from collections.abc import Awaitable, Callable

import anyio.to_thread

from jobs.job import Job
from service.auth import Caller
from service.errors import CallerLeft, TookTooLong
from service.mill import Mill

RECHECK_SECONDS = 2.0
"""A waiting request looks at its job at least this often: the queue thins out progress events."""

_GATHER_SECONDS = 1e-4
"""News of a job are gathered for so long per image, since telling of a large one is work."""


async def wait_for_job(
    mill: Mill, caller: Caller, job_id: str, enough: Callable[[Job], bool], seconds: float
) -> Job:
    """The job, once it is `enough`, or `seconds` have passed, or the service is stopping."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    with mill.hub.watch(job_id) as watch:
        while True:
            job = await anyio.to_thread.run_sync(mill.store.job, job_id, caller.tenant)
            left = deadline - loop.time()
            if enough(job) or left <= 0 or mill.hub.closing:
                return job
            if await watch.news_within(min(left, RECHECK_SECONDS)):
                await asyncio.sleep(job.counts.total * _GATHER_SECONDS)


async def finish_or_cancel(
    mill: Mill,
    caller: Caller,
    job_id: str,
    has_left: Callable[[], Awaitable[bool]],
    *,
    keep: bool = False,
) -> Job:
    """The finished job, for a caller that waits on the line for it.

    When the caller has left, or the settings' patience is at its end, the job is cancelled: nobody
    would ever fetch it; unless `keep` says that the caller will come again. Raises CallerLeft,
    TookTooLong.
    """
    loop = asyncio.get_running_loop()
    patience = mill.settings.sync_seconds
    deadline = loop.time() + patience
    with mill.hub.watch(job_id) as watch:
        while True:
            job = await anyio.to_thread.run_sync(mill.store.job, job_id, caller.tenant)
            if job.state.finished:
                return job
            left = deadline - loop.time()
            gone = await has_left()
            if gone or left <= 0 or mill.hub.closing:
                if not keep:
                    await anyio.to_thread.run_sync(mill.store.cancel, job_id, caller.tenant)
                raise (
                    CallerLeft("the caller left")
                    if gone
                    else TookTooLong(f"the images were not made within {patience:g} seconds")
                )
            await watch.news_within(min(left, RECHECK_SECONDS))
