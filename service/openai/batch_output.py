"""A finished batch's output and error files, with one line of JSON per line of the input.

Lines are written job by job rather than in input order, so match them by `custom_id`. Depends on
the store and the stored files; doesn't decide when a batch is finished.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jobs.errors import ImagemillError, NotFound
from jobs.job import ImageView, State
from service.context import ServiceContext
from service.http.errors import Gone, ImagesFailed, failure_of, openai_error
from service.openai.answers import generated
from service.openai.batch_input import PlannedLine, RefusedLine
from service.read.views import Links


@dataclass(frozen=True, slots=True)
class Outcome:
    """The files' ids, None for a file without lines, and the number of lines by outcome."""

    output_file_id: str | None
    error_file_id: str | None
    completed: int
    failed: int


def write_outcome(
    context: ServiceContext,
    tenant: str,
    batch_id: str,
    jobs: Sequence[str],
    lines: Sequence[PlannedLine],
    refused: Sequence[RefusedLine],
    links: Links,
    stopped: str,
) -> Outcome:
    """Write both files of a batch whose jobs are finished.

    `stopped` is the error code of lines that were cancelled or whose job was deleted.
    """
    counts = {True: 0, False: 0}  # lines that succeeded, lines that failed
    with (
        context.files.adding(tenant, f"{batch_id}_output.jsonl", "batch_output") as good,
        context.files.adding(tenant, f"{batch_id}_error.jsonl", "batch_output") as bad,
    ):
        bad_requests = ((False, _bad_request(line)) for line in refused)
        for is_good, entry in chain(bad_requests, _entries(context, jobs, lines, links, stopped)):
            counts[is_good] += 1
            (good if is_good else bad).target.write(json.dumps(entry).encode() + b"\n")
    for file, count in ((good, counts[True]), (bad, counts[False])):
        if not count:
            context.files.remove(tenant, file.id)
    return Outcome(
        good.id if counts[True] else None,
        bad.id if counts[False] else None,
        counts[True],
        counts[False],
    )


def is_complete(line: PlannedLine, images: Sequence[ImageView]) -> bool:
    """Whether all images of a line are finished."""
    own = images[line.first : line.first + line.count]
    return len(own) == line.count and all(image.result for image in own)


def _entries(
    context: ServiceContext,
    jobs: Sequence[str],
    lines: Sequence[PlannedLine],
    links: Links,
    stopped: str,
) -> Iterator[tuple[bool, dict[str, Any]]]:
    for place, job_id in enumerate(jobs):
        images = images_of(context, job_id)
        for line in lines:
            if line.job == place:
                yield _entry(context, job_id, line, images, links, stopped)


def images_of(context: ServiceContext, job_id: str) -> list[ImageView]:
    """A job's images; empty if the job was deleted."""
    try:
        return context.store.images(job_id)
    except NotFound:
        return []


def _entry(
    context: ServiceContext,
    job_id: str,
    line: PlannedLine,
    images: Sequence[ImageView],
    links: Links,
    stopped: str,
) -> tuple[bool, dict[str, Any]]:
    own = images[line.first : line.first + line.count]
    if is_complete(line, images):
        try:
            body = generated(context.images, links, job_id, own, line.form)
        except NotFound as error:
            return False, _line(line.custom_id, _failed(Gone(str(error))))
        return True, _line(
            line.custom_id, {"status_code": 200, "body": body.model_dump(mode="json")}
        )
    failed = next((image for image in own if image.state is State.FAILED), None)
    if failed is not None:
        reason = f"image {failed.index - line.first} failed: {failed.error}"
        return False, _line(line.custom_id, _failed(ImagesFailed(reason)))
    message = "this request was not finished: the batch was stopped, or its job was deleted"
    return False, _line(line.custom_id, None, {"code": stopped, "message": message})


def _failed(error: ImagemillError) -> dict[str, Any]:
    failure = failure_of(error)
    return {"status_code": failure.status, "body": {"error": openai_error(failure)}}


def _bad_request(line: RefusedLine) -> dict[str, Any]:
    return _line(line.custom_id, {"status_code": 400, "body": {"error": line.error}})


def _line(
    custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None = None
) -> dict[str, Any]:
    number = secrets.token_hex(12)
    if response is not None:
        response = {"request_id": f"req_{number}", **response}
    return {
        "id": f"batch_req_{number}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
