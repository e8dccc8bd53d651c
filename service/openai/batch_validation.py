"""Checks a batch's lines and queues them, on a thread, after the batch has been answered.

A file of 50,000 lines takes seconds, in which clients give up and try again. If the process ends
meanwhile, the check starts again; the jobs' idempotency keys keep it from queuing them twice.
Doesn't depend on HTTP.
"""

import json
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import structlog

from jobs.errors import ImagemillError, QuotaExceeded, StorageUnavailable
from service.context import ServiceContext
from service.http.auth import Caller
from service.http.errors import NotReady, failure_of
from service.openai.batch_input import BatchPlan, Rules, plan
from service.openai.batch_schemas import BatchErrorView
from service.submit.enqueue import priority_of, submit

log = structlog.get_logger(__name__)

LINES, REFUSED = ".lines", ".refused"
"""Suffixes of a batch's files with its planned and its refused lines."""

validation_lock = threading.Lock()
"""Held while a batch that's being checked is read and written back."""

RETRY_SECONDS = 5.0
"""Pause before another try, if the queue is unreachable or no worker has read the model yet."""

_active: set[str] = set()


def start_validation(context: ServiceContext, tenant: str, batch_id: str) -> None:
    """Check and queue a batch's lines on a thread, unless this process already does."""
    with validation_lock:
        if batch_id in _active:
            return
        _active.add(batch_id)
    threading.Thread(
        target=_run, args=(context, tenant, batch_id), name="batch", daemon=True
    ).start()


def _run(context: ServiceContext, tenant: str, batch_id: str) -> None:
    try:
        while not context.hub.closing:
            try:
                document = context.batches.get(tenant, batch_id)
                if document["validating"]:
                    _validate(context, Caller(**document["caller"]), document)
                return
            except (StorageUnavailable, NotReady) as error:
                log.warning("batch can't be queued yet", batch=batch_id, error=str(error))
                time.sleep(RETRY_SECONDS)
    finally:
        with validation_lock:
            _active.discard(batch_id)


def _validate(context: ServiceContext, caller: Caller, document: dict[str, Any]) -> None:
    batch_id = document["id"]
    found: dict[str, Any]
    jobs: list[str] = []
    try:
        planned = _plan(context, caller, document)
        found = _findings(planned)
        if not planned.errors and not context.batches.get(caller.tenant, batch_id)["cancelling_at"]:
            _write_lines(context, caller, batch_id, planned)
            jobs = _submit(context, caller, planned, batch_id)
    except (StorageUnavailable, NotReady):
        raise
    except ImagemillError as error:  # the file is gone, or the caller's quota is too small
        code = (failure_of(error).slug or "invalid_request").replace("-", "_")
        found = {"errors": [BatchErrorView(code=code, line=None, message=str(error), param=None)]}
    now = int(time.time())
    with validation_lock:
        document = context.batches.get(caller.tenant, batch_id)
        document |= {**found, "validating": False, "jobs": jobs}
        document["errors"] = [error.model_dump() for error in document["errors"]]
        if document["errors"]:
            document["failed_at"] = now
        elif not jobs and document["cancelling_at"]:
            document |= {"cancelled_at": now, "total": 0, "refused": 0}
        else:
            document["in_progress_at"] = now
        context.batches.put(caller.tenant, batch_id, document)
    if document["cancelling_at"]:
        for job_id in jobs:
            context.store.cancel(job_id, caller.tenant)


def _plan(context: ServiceContext, caller: Caller, document: dict[str, Any]) -> BatchPlan:
    path = context.files.path(caller.tenant, document["input_file_id"])
    with path.open("rb") as raw:
        return plan(raw, Rules(context.catalog, context.cards.of, partial(priority_of, caller)))


def _findings(planned: BatchPlan) -> dict[str, Any]:
    """The fields of a batch's document that its plan decides."""
    return {
        "errors": planned.errors,
        "total": 0 if planned.errors else len(planned.lines) + len(planned.refused),
        "refused": 0 if planned.errors else len(planned.refused),
        "single": all(line.count == 1 for line in planned.lines),
    }


def _write_lines(
    context: ServiceContext, caller: Caller, batch_id: str, planned: BatchPlan
) -> None:
    for suffix, lines in ((LINES, planned.lines), (REFUSED, planned.refused)):
        with context.batches.writing(caller.tenant, batch_id, suffix) as target:
            for line in lines:
                values = [getattr(line, name) for name in line.__slots__]
                target.write(json.dumps(values).encode() + b"\n")


def _submit(
    context: ServiceContext, caller: Caller, planned: BatchPlan, batch_id: str
) -> list[str]:
    """Submit all jobs of a plan, or none."""
    job_ids: list[str] = []
    try:
        for place, job in enumerate(planned.jobs):
            submitted = submit(
                context,
                caller,
                job.requests,
                priority=job.priority,
                metadata={"batch": batch_id},
                idempotency=(f"{batch_id}/{place}", f"{len(job.requests)} images"),
            )
            job_ids.append(submitted.job_id)
    except QuotaExceeded:
        _delete(context, caller, job_ids)
        raise
    return job_ids


def _delete(context: ServiceContext, caller: Caller, jobs: Sequence[str]) -> None:
    """Try to delete the jobs. Raises nothing of ours, because another error is being handled."""
    for job_id in jobs:
        try:
            context.store.delete(job_id, caller.tenant)
        except ImagemillError as error:
            log.warning("couldn't delete a job of a failed batch", job=job_id, error=str(error))
