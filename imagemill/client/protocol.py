"""The protocol with the server, without any I/O.

Each operation is a generator. It yields a `Call` to send or a `Pause` to wait, receives the
response (or has the transport error thrown in), and returns the parsed result. `Client` drives it
with a blocking httpx client and `AsyncClient` with an asynchronous one, so retries, bodies and
errors are handled in one place.
"""

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from imagemill.client.errors import ApiError, CorruptDownload, InvalidInput, ServerUnreachable
from imagemill.client.file_names import file_name
from jobs.errors import FieldProblem
from jobs.job import State
from jobs.media import SUFFIXES

T = TypeVar("T")

TOO_MANY = 429
RETRIED = frozenset({TOO_MANY, 502, 503})
"""Temporary failures: too many requests, or a server that's briefly unavailable."""

OK, NOT_FOUND, CONFLICT = 200, 404, 409

VISIBLE = re.compile(r"[!-~]{1,255}")
"""What an API key or an idempotency key may contain, because it's sent in a header."""

FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0
LONG_POLL = 20.0
"""Seconds that the server is asked to hold a poll until something changes."""
DOWNLOADS_AT_ONCE = 4
DOWNLOADS = 3
"""Attempts to download an image with the right checksum."""
POLL_PAUSE = 0.25
"""Seconds between two polls, so that a job that changes constantly isn't polled constantly."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the server, safe to send twice.

    `done` is the error status that means an earlier attempt already succeeded. After an attempt
    whose response may have been lost, it counts as success.
    """

    method: str
    path: str
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    read_timeout: float = 30.0
    done: int | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this many seconds before continuing."""

    seconds: float


Conversation = Generator[Call | Pause, httpx.Response | None, T]


def send(call: Call, patience: float) -> Conversation[httpx.Response]:
    """Send a call, with retries, until it's answered; raises ApiError for any status from 400 on.

    Connection errors and RETRIED statuses are retried after the server's Retry-After, or else after
    growing, jittered delays, as long as the delays add up to at most `patience` seconds.
    """
    waited, attempt, in_doubt = 0.0, 0, False
    while True:
        failure: httpx.TransportError | ApiError
        requested: float | None = None
        try:
            response = yield call
            assert response is not None
            if response.status_code < 400 or (in_doubt and response.status_code == call.done):
                return response
            failure = api_error(response)
            requested = retry_after(response.headers.get("Retry-After"))
            again = response.status_code in RETRIED
            in_doubt = in_doubt or response.status_code != TOO_MANY
        except httpx.TransportError as error:
            failure = error
            again = True
            in_doubt = in_doubt or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        delay = backoff(attempt) if requested is None else requested
        if not again or waited + delay > patience:
            if isinstance(failure, ApiError):
                raise failure
            raise _unreachable(failure) from failure
        yield Pause(delay)
        waited, attempt = waited + delay, attempt + 1


def _unreachable(failure: httpx.TransportError) -> ServerUnreachable:
    """The error for a server that didn't answer, without the errno in its reason."""
    url = failure.request.url
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(failure)) or type(failure).__name__
    return ServerUnreachable(f"{url.scheme}://{url.netloc.decode()}", reason)


def backoff(attempt: int) -> float:
    """Seconds to wait after a failed attempt: doubling, bounded, with 50 to 100 % jitter."""
    longest = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(attempt, 30))
    return longest * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After header, which is an integer or an HTTP date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def api_error(response: httpx.Response) -> ApiError:
    """The error in a response: problem+json, OpenAI's envelope, or just the status."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return ApiError(response.status_code, response.reason_phrase or "error")
    envelope = body.get("error")
    if isinstance(envelope, dict):
        body = {"title": envelope.get("type"), "detail": envelope.get("message")}
    errors = [
        FieldProblem(str(item.get("pointer", "")), str(item.get("detail", "")))
        for item in body.get("errors") or ()
        if isinstance(item, dict)
    ]
    title = str(body.get("title") or response.reason_phrase or "error")
    return ApiError(response.status_code, title, str(body.get("detail") or ""), errors)


def submit(
    model: str,
    prompts: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
    fields: Mapping[str, Any],
    key: str,
    patience: float,
) -> Conversation[dict[str, Any]]:
    """Submit a batch; the idempotency key makes it safe to retry after a lost response."""
    if not VISIBLE.fullmatch(key):
        raise InvalidInput("invalid idempotency key: it must be 1 to 255 visible ASCII characters")
    items = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    set_fields = {name: value for name, value in fields.items() if value is not None}
    body = {"model": model, "prompts": items, **set_fields}
    _check_json(body)
    call = Call("POST", "/v1/jobs", body, {"Idempotency-Key": key}, read_timeout=120)
    response = yield from send(call, patience)
    return as_object(response)


def _check_json(body: Mapping[str, Any]) -> None:
    """Raise InvalidInput for values that JSON can't represent: surrogates, NaN, infinity."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 30) : error.end]
        excerpt = near.encode(errors="replace").decode()
        raise InvalidInput(f"invalid UTF-8 in a string: …{excerpt}") from error
    except ValueError as error:
        raise InvalidInput("numbers must be finite") from error


def job_path(job_id: str, rest: str = "") -> str:
    """The path of a job. The id may be anything a user typed, so it's quoted as one segment."""
    return f"/v1/jobs/{quote(job_id, safe='', errors='replace')}{rest}"


def fetch(path: str, patience: float, **params: Any) -> Conversation[dict[str, Any]]:
    """GET a JSON object."""
    query = {name: value for name, value in params.items() if value is not None}
    response = yield from send(Call("GET", path, params=query), patience)
    return as_object(response)


def poll(
    job_id: str, wait: float, etag: str | None, patience: float, *, brief: bool = False
) -> Conversation[tuple[dict[str, Any] | None, str | None]]:
    """The job once it differs from `etag`, or None if it hasn't changed within `wait` seconds.

    Without an ETag, waits for the job's end. Returns the job with its new ETag. A `brief` job has
    no images.
    """
    headers = {"If-None-Match": etag} if etag else {}
    params: dict[str, Any] = {"wait": round(wait, 1)} if wait > 0 else {}
    if brief:
        params["images"] = "none"
    call = Call("GET", job_path(job_id), None, headers, params, read_timeout=wait + 30)
    response = yield from send(call, patience)
    if response.status_code == 304:
        return None, etag
    return as_object(response), response.headers.get("ETag")


def until_finished(
    job_id: str,
    timeout: float,
    patience: float,
    on_change: Callable[[dict[str, Any]], object] | None = None,
) -> Conversation[dict[str, Any]]:
    """Wait until the job has ended; raises TimeoutError after about `timeout` seconds.

    `on_change` is called with the job, without images, immediately and after every change.
    """
    deadline = time.monotonic() + timeout
    etag: str | None = None
    while True:
        left = deadline - time.monotonic()
        is_first_poll = on_change is not None and etag is None
        wait = 0.0 if is_first_poll else min(LONG_POLL, max(0.0, left))
        job, new_etag = yield from poll(job_id, wait, etag, patience, brief=True)
        if job is not None and on_change is not None:
            on_change(job)
            etag = new_etag
        if job is not None and State(job["state"]).finished:
            return (yield from fetch(job_path(job_id), patience))
        if left <= 0:
            raise TimeoutError(f"job {job_id} hasn't finished within {timeout:g} s")
        yield Pause(min(POLL_PAUSE, left))


def act(job_id: str, verb: str, patience: float) -> Conversation[dict[str, Any]]:
    """`cancel` or `retry` a job; returns the job.

    A retry that already took effect, because only its response was lost, counts as success. If it's
    sent again, images that have failed in the meantime are retried too.
    """
    call = Call("POST", job_path(job_id, f"/{verb}"), done=CONFLICT if verb == "retry" else None)
    response = yield from send(call, patience)
    if response.status_code == CONFLICT:
        return (yield from fetch(job_path(job_id), patience))
    return as_object(response)


def remove(job_id: str, patience: float) -> Conversation[None]:
    """Delete a job and its files; a 404 after a lost response counts as success."""
    yield from send(Call("DELETE", job_path(job_id), done=NOT_FOUND), patience)


def download(job_id: str, index: int, sha256: str, patience: float) -> Conversation[bytes]:
    """Download an image and check it against the committed checksum, with a few attempts."""
    call = Call("GET", job_path(job_id, f"/images/{index}"))
    for _ in range(DOWNLOADS):
        response = yield from send(call, patience)
        if hashlib.sha256(response.content).hexdigest() == sha256:
            return response.content
    raise CorruptDownload(
        f"image {index} of job {job_id} had a wrong checksum in {DOWNLOADS} downloads"
    )


def preview(job_id: str, index: int, patience: float) -> Conversation[bytes | None]:
    """A preview of a running image as a JPEG; None if there isn't one yet.

    The request makes the image's worker generate previews for a while.
    """
    try:
        path = job_path(job_id, f"/images/{index}/preview")
        response = yield from send(Call("GET", path), patience)
    except ApiError as error:
        if error.status == NOT_FOUND:
            return None
        raise
    return response.content if response.status_code == OK else None


def name_of(job: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    """The file name of a finished image; `job` and `image` are as sent by the server."""
    suffix = SUFFIXES.get(image["media_type"], ".bin")
    return file_name(image["index"], image["prompt"], suffix, job["counts"]["total"])


def lines(chunks: Iterable[str]) -> Iterator[str]:
    """Split a stream's text into lines, only at newlines because JSON may contain U+2028."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from (line.removesuffix("\r") for line in whole)


def as_object(response: httpx.Response) -> dict[str, Any]:
    """The response's JSON object; raises ApiError if it's anything else."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        title = (
            f"{response.request.url} isn't an imagemill server: its response isn't a JSON object"
        )
        raise ApiError(response.status_code, title)
    return body
