"""OpenAI Batches on top of our jobs: create, view, finish, cancel.

A batch is a document on disk that lists its jobs. Nothing watches it once its lines are queued: the
first request that reads it after its jobs are finished writes its output files, so a restart loses
nothing.
Doesn't depend on HTTP.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from jobs.errors import FieldProblem, IdempotencyMismatch, InvalidRequest, NotFound
from jobs.job import Job
from service.context import ServiceContext
from service.http.auth import Caller
from service.openai.batch_input import PlannedLine, RefusedLine
from service.openai.batch_output import images_of, is_complete, write_outcome
from service.openai.batch_schemas import ENDPOINT, BatchView, CreateBatch
from service.openai.batch_validation import LINES, REFUSED, start_validation, validation_lock
from service.submit.enqueue import checked_key

WINDOW_SECONDS = 86400
"""The completion window, `24h`; unfinished lines are cancelled after that."""

ABANDONED_SECONDS = 60
"""After that, a batch that's still being checked may have been left by a process that ended, so the
next request for it starts the check again."""

_ENDS = ("failed_at", "completed_at", "expired_at", "cancelled_at")
_finishing: set[str] = set()
_lock = threading.Lock()


def begin(
    context: ServiceContext, caller: Caller, body: CreateBatch, base: str, key: str | None
) -> BatchView:
    """Create a batch; its lines are checked and queued on a thread (`batch_validation`).

    `base` is the URL at which the caller reaches us, for URLs in the output. The same `key` returns
    the same batch. Raises NotFound if there's no such file, InvalidRequest, MalformedHeader,
    IdempotencyMismatch, StorageUnavailable.
    """
    digest = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
    batch_id = context.batches.new_id()
    if key is not None:  # the id comes from the key, so that two requests can't make two batches
        batch_id = f"batch_{hashlib.sha256(checked_key(key).encode()).hexdigest()[:24]}"
        with suppress(NotFound):
            return _again(context, caller, batch_id, digest)
    file = context.files.get(caller.tenant, body.input_file_id)
    if file.purpose != "batch":
        detail = f"the file's purpose must be batch, not {file.purpose}"
        raise InvalidRequest(detail, (FieldProblem("/input_file_id", detail),))
    document = _document(batch_id, caller, body, base) | {"digest": digest}
    if not context.batches.create(caller.tenant, batch_id, document):
        return _again(context, caller, batch_id, digest)
    start_validation(context, caller.tenant, batch_id)
    return _view(document, 0, 0)


def _again(context: ServiceContext, caller: Caller, batch_id: str, digest: str) -> BatchView:
    """The batch that the same key made before."""
    if context.batches.get(caller.tenant, batch_id)["digest"] != digest:
        raise IdempotencyMismatch("this Idempotency-Key was already used with a different body")
    return look(context, caller, batch_id)


def look(context: ServiceContext, caller: Caller, batch_id: str) -> BatchView:
    """A batch's state. Writes its output files once its jobs are finished. Raises NotFound."""
    document = context.batches.get(caller.tenant, batch_id)
    if _is_over(document):
        return _view(document, document["completed"], document["failed"])
    if document.get("validating"):
        if time.time() > document["created_at"] + ABANDONED_SECONDS:
            start_validation(context, caller.tenant, batch_id)
        return _view(document, 0, 0)
    jobs = _jobs(context, caller, document)
    if time.time() > document["expires_at"] and not document["cancelling_at"]:
        _stop(context, caller, document, "batch_expired")
        jobs = _jobs(context, caller, document)
    elif document["cancelling_at"] and any(job and not job.state.finished for job in jobs):
        _cancel_jobs(context, caller, document)  # the queue was down when they were cancelled
        jobs = _jobs(context, caller, document)
    lines = _lines(context, caller, document)
    if all(job is None or job.state.finished for job in jobs):
        with _once(batch_id) as is_ours:
            if is_ours:
                _finish(context, caller, document, lines)
                return _view(document, document["completed"], document["failed"])
        document["finalizing_at"] = int(time.time())
    return _view(document, *_counts(context, document, jobs, lines))


def cancel(context: ServiceContext, caller: Caller, batch_id: str) -> BatchView:
    """Cancel a batch. Finished lines are kept; a finished batch is left unchanged."""
    with validation_lock:
        document = context.batches.get(caller.tenant, batch_id)
        if document.get("validating"):  # the validation ends the batch
            document |= {"cancelling_at": int(time.time()), "stopped": "batch_cancelled"}
            context.batches.put(caller.tenant, batch_id, document)
            return _view(document, 0, 0)
    if not _is_over(document) and not document["cancelling_at"]:
        _stop(context, caller, document, "batch_cancelled")
    return look(context, caller, batch_id)


def _document(batch_id: str, caller: Caller, body: CreateBatch, base: str) -> dict[str, Any]:
    now = int(time.time())
    return {
        "id": batch_id,
        "created_at": now,
        "expires_at": now + WINDOW_SECONDS,
        "input_file_id": body.input_file_id,
        "metadata": body.metadata,
        "validating": True,
        "caller": asdict(caller),
        "in_progress_at": None,
        "jobs": [],
        "total": 0,
        "refused": 0,
        "single": True,
        "errors": [],
        "base": base,
        "stopped": "batch_expired",
        "completed": 0,
        "failed": 0,
        "output_file_id": None,
        "error_file_id": None,
        "cancelling_at": None,
        "finalizing_at": None,
        **dict.fromkeys(_ENDS),
    }


def _stop(context: ServiceContext, caller: Caller, document: dict[str, Any], code: str) -> None:
    document["cancelling_at"] = int(time.time())
    document["stopped"] = code
    context.batches.put(caller.tenant, document["id"], document)
    _cancel_jobs(context, caller, document)


def _cancel_jobs(context: ServiceContext, caller: Caller, document: dict[str, Any]) -> None:
    for job in _jobs(context, caller, document):
        if job is not None:
            context.store.cancel(job.id, caller.tenant)


def _jobs(context: ServiceContext, caller: Caller, document: dict[str, Any]) -> list[Job | None]:
    """The batch's jobs; None for a deleted one."""
    jobs: list[Job | None] = []
    for job_id in document["jobs"]:
        try:
            jobs.append(context.store.job(job_id, caller.tenant))
        except NotFound:
            jobs.append(None)
    return jobs


def _lines(context: ServiceContext, caller: Caller, document: dict[str, Any]) -> list[PlannedLine]:
    path = context.batches.path(caller.tenant, document["id"], LINES)
    with path.open("rb") as raw:
        return [PlannedLine(*json.loads(text)) for text in raw]


def _refused(
    context: ServiceContext, caller: Caller, document: dict[str, Any]
) -> list[RefusedLine]:
    if not document.get("refused"):  # batches from older versions have no such file
        return []
    with context.batches.path(caller.tenant, document["id"], REFUSED).open("rb") as raw:
        return [RefusedLine(*json.loads(text)) for text in raw]


def _finish(
    context: ServiceContext, caller: Caller, document: dict[str, Any], lines: Sequence[PlannedLine]
) -> None:
    """Write the output files and mark the batch as finished, unless that's already done."""
    document.update(context.batches.get(caller.tenant, document["id"]))
    if _is_over(document):
        return
    outcome = write_outcome(
        context,
        caller.tenant,
        document["id"],
        document["jobs"],
        lines,
        _refused(context, caller, document),
        context.links.at(document["base"]),
        document["stopped"],
    )
    document.update(asdict(outcome))
    end = "completed_at"
    if document["cancelling_at"]:
        end = "expired_at" if document["stopped"] == "batch_expired" else "cancelled_at"
    document["finalizing_at"] = document[end] = int(time.time())
    context.batches.put(caller.tenant, document["id"], document)


def _counts(
    context: ServiceContext,
    document: dict[str, Any],
    jobs: Sequence[Job | None],
    lines: Sequence[PlannedLine],
) -> tuple[int, int]:
    """The number of completed and failed lines so far."""
    refused = document.get("refused", 0)
    if document["single"]:
        # Every line has one image, so the jobs' counts suffice and no images need to be read.
        counts = [job.counts for job in jobs if job is not None]
        failed = sum(count.failed for count in counts)
        return sum(count.succeeded for count in counts), refused + failed
    images = [images_of(context, job_id) for job_id in document["jobs"]]
    completed = sum(is_complete(line, images[line.job]) for line in lines)
    failed = sum(
        any(image.error for image in images[line.job][line.first : line.first + line.count])
        for line in lines
    )
    return completed, refused + failed


def _is_over(document: dict[str, Any]) -> bool:
    return any(document[end] for end in _ENDS)


@contextmanager
def _once(batch_id: str) -> Iterator[bool]:
    """Whether this thread may finish the batch; False while another does."""
    with _lock:
        is_ours = batch_id not in _finishing
        _finishing.add(batch_id)
    try:
        yield is_ours
    finally:
        if is_ours:
            with _lock:
                _finishing.discard(batch_id)


def _status(document: dict[str, Any]) -> str:
    for end in _ENDS:
        if document[end]:
            return end.removesuffix("_at")
    if document["finalizing_at"]:
        return "finalizing"
    if document["cancelling_at"]:
        return "cancelling"
    return "validating" if document.get("validating") else "in_progress"


def _view(document: dict[str, Any], completed: int, failed: int) -> BatchView:
    fields = {name: document.get(name) for name in BatchView.model_fields if name in document}
    if "validating" not in document and not document["errors"]:  # from an older version
        fields["in_progress_at"] = document["created_at"]
    errors = {"data": document["errors"]} if document["errors"] else None
    counts = {"total": document["total"], "completed": completed, "failed": failed}
    return BatchView.model_validate(
        {
            **fields,
            "endpoint": ENDPOINT,
            "completion_window": "24h",
            "errors": errors,
            "status": _status(document),
            "request_counts": counts,
        }
    )
