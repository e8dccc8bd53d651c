"""The conversation with the server, without any input or output of its own.

Each operation is a generator that yields a `Call` to be sent or a `Pause` to be waited, gets the
response back (or the transport error thrown in), and returns the parsed result. `Client` drives
them with a blocking httpx client and `AsyncClient` with an asynchronous one, so every rule about
retries, bodies and errors is here once.
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
from imagemill.client.file_names import SUFFIXES, file_name
from jobs.errors import FieldProblem
from jobs.job import State

T = TypeVar("T")

TOO_MANY = 429
RETRIED = frozenset({TOO_MANY, 502, 503})
"""Statuses that promise to pass: too many requests, and a server that is away for the moment."""

OK, NOT_FOUND, CONFLICT = 200, 404, 409

VISIBLE = re.compile(r"[!-~]{1,255}")
"""What an API key or an idempotency key may be: it travels in a header."""

FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0
LONG_POLL = 20.0
"""Seconds for which the server is asked to hold a poll until something changes."""
DOWNLOADS_AT_ONCE = 4
DOWNLOADS = 3
"""How often an image is asked for before its bytes are given up as wrong."""
POLL_PAUSE = 0.25
"""Seconds between two polls, so that a job that changes all the time is not asked all the time."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the server, which it does no harm to send twice.

    `done` is the refusal that a call meets which was done before: an answer like any other once an
    earlier answer may have been lost.
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
    """Wait for so many seconds before going on."""

    seconds: float


Conversation = Generator[Call | Pause, httpx.Response | None, T]


def speak(call: Call, patience: float) -> Conversation[httpx.Response]:
    """Send a call until it is answered; raises ApiError for any status from 400 on.

    Connection errors and RETRIED statuses are tried again with growing, jittered delays, or when
    the server's Retry-After says, for `patience` seconds of delays in all.
    """
    waited, attempt, in_doubt = 0.0, 0, False
    while True:
        failure: httpx.TransportError | ApiError
        wish: float | None = None
        try:
            response = yield call
            assert response is not None
            if response.status_code < 400 or (in_doubt and response.status_code == call.done):
                return response
            failure = api_error(response)
            wish = retry_after(response.headers.get("Retry-After"))
            again = response.status_code in RETRIED
            in_doubt = in_doubt or response.status_code != TOO_MANY
        except httpx.TransportError as error:
            failure = error
            again = True
            in_doubt = in_doubt or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        delay = backoff(attempt) if wish is None else wish
        if not again or waited + delay > patience:
            if isinstance(failure, ApiError):
                raise failure
            raise _unreachable(failure) from failure
        yield Pause(delay)
        waited, attempt = waited + delay, attempt + 1


def _unreachable(failure: httpx.TransportError) -> ServerUnreachable:
    """Who did not answer, and why, without the number of the error."""
    url = failure.request.url
    reason = re.sub(r"^\[Errno -?\d+\] ", "", str(failure)) or type(failure).__name__
    return ServerUnreachable(f"{url.scheme}://{url.netloc.decode()}", reason)


def backoff(attempt: int) -> float:
    """Seconds before attempt `attempt` + 1: doubling, bounded, with a random half."""
    longest = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(attempt, 30))
    return longest * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds out of a Retry-After header: a whole number of seconds or an HTTP date."""
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
    """The typed error of a refusal: problem+json, OpenAI's envelope, or whatever there is."""
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
    """Submit a batch; the idempotency key lets a lost answer be asked for again."""
    if not VISIBLE.fullmatch(key):
        raise InvalidInput("an idempotency key is 1 to 255 ASCII letters, digits and signs")
    several = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    given = {name: value for name, value in fields.items() if value is not None}
    body = {"model": model, "prompts": several, **given}
    _check_json(body)
    call = Call("POST", "/v1/jobs", body, {"Idempotency-Key": key}, read_timeout=120)
    response = yield from speak(call, patience)
    return as_object(response)


def _check_json(body: Mapping[str, Any]) -> None:
    """Raises InvalidInput for what JSON cannot carry: no characters, NaN, an infinity."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 30) : error.end]
        shown = near.encode(errors="replace").decode()
        raise InvalidInput(f"a text holds bytes that are not UTF-8: …{shown}") from error
    except ValueError as error:
        raise InvalidInput("a number must not be NaN or infinite") from error


def job_path(job_id: str, rest: str = "") -> str:
    """Where a job is; whatever was typed for an id is one part of the path."""
    return f"/v1/jobs/{quote(job_id, safe='', errors='replace')}{rest}"


def fetch(path: str, patience: float, **params: Any) -> Conversation[dict[str, Any]]:
    """GET a JSON object."""
    given = {name: value for name, value in params.items() if value is not None}
    response = yield from speak(Call("GET", path, params=given), patience)
    return as_object(response)


def poll(
    job_id: str, wait: float, etag: str | None, patience: float, *, brief: bool = False
) -> Conversation[tuple[dict[str, Any] | None, str | None]]:
    """The job once it changes from what `etag` stood for, or None if it has not in `wait` seconds.

    Without an ETag the wait is for the job's end. Returns the new ETag with the job. A `brief`
    job lists no images.
    """
    headers = {"If-None-Match": etag} if etag else {}
    params: dict[str, Any] = {"wait": round(wait, 1)} if wait > 0 else {}
    if brief:
        params["images"] = "none"
    call = Call("GET", job_path(job_id), None, headers, params, read_timeout=wait + 30)
    response = yield from speak(call, patience)
    if response.status_code == 304:
        return None, etag
    return as_object(response), response.headers.get("ETag")


def until_finished(
    job_id: str,
    timeout: float,
    patience: float,
    tell: Callable[[dict[str, Any]], object] | None = None,
) -> Conversation[dict[str, Any]]:
    """Wait until the job has ended; raises TimeoutError after about `timeout` seconds.

    `tell` gets the job without its images, at once and whenever it has changed.
    """
    deadline = time.monotonic() + timeout
    etag: str | None = None
    while True:
        left = deadline - time.monotonic()
        is_first_look = tell is not None and etag is None
        waits = 0.0 if is_first_look else min(LONG_POLL, max(0.0, left))
        job, seen = yield from poll(job_id, waits, etag, patience, brief=True)
        if job is not None and tell is not None:
            tell(job)
            etag = seen
        if job is not None and State(job["state"]).finished:
            return (yield from fetch(job_path(job_id), patience))
        if left <= 0:
            raise TimeoutError(f"job {job_id} has not ended within {timeout:g} s")
        yield Pause(min(POLL_PAUSE, left))


def act(job_id: str, verb: str, patience: float) -> Conversation[dict[str, Any]]:
    """`cancel` or `retry` a job; a retry of which only the answer was lost tells the job as it is.

    One that is sent again also makes again what has failed in between.
    """
    call = Call("POST", job_path(job_id, f"/{verb}"), done=CONFLICT if verb == "retry" else None)
    response = yield from speak(call, patience)
    if response.status_code == CONFLICT:
        return (yield from fetch(job_path(job_id), patience))
    return as_object(response)


def remove(job_id: str, patience: float) -> Conversation[None]:
    """Delete a job and its files; one that is gone when the call is repeated was deleted by it."""
    yield from speak(Call("DELETE", job_path(job_id), done=NOT_FOUND), patience)


def download(job_id: str, index: int, sha256: str, patience: float) -> Conversation[bytes]:
    """An image's bytes, checked against the committed checksum; bad bytes are asked for again."""
    call = Call("GET", job_path(job_id, f"/images/{index}"))
    for _ in range(DOWNLOADS):
        response = yield from speak(call, patience)
        if hashlib.sha256(response.content).hexdigest() == sha256:
            return response.content
    raise CorruptDownload(
        f"image {index} of job {job_id} arrived {DOWNLOADS} times with a wrong checksum"
    )


def preview(job_id: str, index: int, patience: float) -> Conversation[bytes | None]:
    """What a running image is about to become, as a JPEG; None while nothing can be seen of it.

    Asking makes its worker draw previews for a while.
    """
    try:
        path = job_path(job_id, f"/images/{index}/preview")
        response = yield from speak(Call("GET", path), patience)
    except ApiError as error:
        if error.status == NOT_FOUND:
            return None
        raise
    return response.content if response.status_code == OK else None


def name_of(job: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    """The file name of a finished image of a job, both as the server tells them."""
    suffix = SUFFIXES.get(image["media_type"], ".bin")
    return file_name(image["index"], image["prompt"], suffix, job["counts"]["total"])


def lines(chunks: Iterable[str]) -> Iterator[str]:
    """A stream's text in lines. Only a newline ends one: JSON may hold U+2028 and its like."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from (line.removesuffix("\r") for line in whole)


def as_object(response: httpx.Response) -> dict[str, Any]:
    """The response's JSON object; anything else means that this is no imagemill server."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        title = f"{response.request.url} does not answer as an imagemill server does"
        raise ApiError(response.status_code, title)
    return body
