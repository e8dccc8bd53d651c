"""Both clients against a scripted transport: bodies, retries and errors."""

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

import imagemill
from imagemill import ApiError, AsyncClient, Client, CorruptDownload, ServerUnreachable
from imagemill.client.protocol import LONGEST_DELAY, backoff, retry_after
from jobs.errors import NotFound
from jobs.job import Counts, State
from tests.waiting import PATIENCE

DATA = b"the bytes of a picture"
SHA256 = hashlib.sha256(DATA).hexdigest()


def job(state: str = "running", finished: int = 1, total: int = 2) -> dict[str, Any]:
    """A job as the service returns it, with `finished` finished images."""
    counts = {"total": total, "succeeded": finished, "queued": total - finished}
    images = [
        {
            "index": index,
            "prompt": f"prompt {index}",
            "seed": index,
            "state": "succeeded" if index < finished else "queued",
            "step": 4 if index < finished else 0,
            "steps": 4,
            "sha256": SHA256 if index < finished else None,
            "media_type": "image/png" if index < finished else None,
            "error": None,
        }
        for index in range(total)
    ]
    return {
        "id": "job-1",
        "model": "demo",
        "state": state,
        "progress": finished / total,
        "counts": {"running": 0, "failed": 0, "cancelled": 0, **counts},
        "images": images,
    }


class Script:
    """Answers requests from a list of responses and errors, and records the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.pauses: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options: Any) -> Client:
        transport = httpx.MockTransport(self)
        return Client("http://server", transport=transport, pause=self.pauses.append, **options)


def test_submit_retries_with_the_same_body_and_key() -> None:
    script = Script(
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.Response(503, headers={"Retry-After": "2"}),
        httpx.Response(202, json=job("queued", finished=0)),
    )
    found = script.client().submit("demo", ["a", {"prompt": "b", "n": 2}], steps=8, seed=None)
    assert (found.id, found.state, found.progress) == ("job-1", State.QUEUED, 0.0)
    bodies = [json.loads(request.content) for request in script.requests]
    assert bodies == [{"model": "demo", "prompts": ["a", {"prompt": "b", "n": 2}], "steps": 8}] * 4
    assert len({request.headers["Idempotency-Key"] for request in script.requests}) == 1
    assert script.pauses[2] == 2.0


def test_each_submit_has_its_own_key_and_accepts_a_single_prompt() -> None:
    script = Script(*[httpx.Response(202, json=job()) for _ in range(3)])
    client = script.client()
    client.submit("demo", "a")
    client.submit("demo", {"prompt": "a"})
    client.submit("demo", (text for text in "ab"), idempotency_key="mine")
    bodies = [json.loads(request.content)["prompts"] for request in script.requests]
    assert bodies == [["a"], [{"prompt": "a"}], ["a", "b"]]
    keys = [request.headers["Idempotency-Key"] for request in script.requests]
    assert keys[2] == "mine"
    assert len(set(keys)) == 3


def test_a_client_error_is_parsed_and_not_retried() -> None:
    problem = {
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "1 invalid field",
        "errors": [{"pointer": "/prompts/0/width", "detail": "width must be a multiple of 16"}],
    }
    script = Script(httpx.Response(422, json=problem))
    with pytest.raises(ApiError) as caught:
        script.client().submit("demo", ["a"], width=7)
    error = caught.value
    assert (error.status, error.title) == (422, "Unprocessable Content")
    assert error.errors[0].pointer == "/prompts/0/width"
    assert str(error) == "1 invalid field (HTTP 422)"
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(500, text="boom"), "Internal Server Error (HTTP 500)"),
        (httpx.Response(400, json={"error": {"message": "no", "type": "bad"}}), "no (HTTP 400)"),
        (httpx.Response(404, json=["odd"]), "Not Found (HTTP 404)"),
        (httpx.Response(200, text="<html>"), "isn't an imagemill server"),
    ],
)
def test_unexpected_responses_raise_api_error(response: httpx.Response, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        Script(response).client().job("job-1")
    assert said in str(caught.value)


def test_retries_end_after_patience() -> None:
    script = Script(*[httpx.ConnectError("refused")] * 100)
    with pytest.raises(ServerUnreachable, match="couldn't reach an imagemill server at"):
        script.client(patience=3).job("job-1")
    assert 1.5 < sum(script.pauses) <= 3
    script = Script(*[httpx.Response(429, headers={"Retry-After": "60"})] * 2)
    with pytest.raises(ApiError, match="429"):
        script.client(patience=30).job("job-1")
    assert script.pauses == []


LOST = [httpx.ReadError("cut"), httpx.ReadTimeout("slow"), httpx.Response(503)]
NEVER_DONE = [httpx.ConnectError("refused"), httpx.Response(429)]


@pytest.mark.parametrize("failure", [*LOST, *NEVER_DONE])
def test_retry_is_resent_until_it_is_answered(failure: httpx.Response | Exception) -> None:
    script = Script(
        httpx.Response(200, json=job("failed")), failure, httpx.Response(202, json=job("queued"))
    )
    assert script.client().job("job-1").retry().state is State.QUEUED


@pytest.mark.parametrize("failure", LOST)
def test_a_conflict_after_a_lost_response_counts_as_success(
    failure: httpx.Response | Exception,
) -> None:
    script = Script(
        httpx.Response(200, json=job("failed")),
        failure,
        httpx.ConnectError("refused"),
        httpx.Response(409),
        httpx.Response(200, json=job("running")),
        failure,
        httpx.Response(404),
    )
    handle = script.client().job("job-1")
    assert handle.retry().state is State.RUNNING
    handle.delete()
    assert [request.method for request in script.requests[3:]] == ["POST", "GET", *["DELETE"] * 2]


@pytest.mark.parametrize("failure", NEVER_DONE)
def test_a_conflict_without_a_lost_response_is_an_error(
    failure: httpx.Response | Exception,
) -> None:
    script = Script(
        httpx.Response(200, json=job()),
        *[failure, httpx.Response(409)],
        *[failure, httpx.Response(404)],
    )
    handle = script.client().job("job-1")
    with pytest.raises(ApiError, match="409"):
        handle.retry()
    with pytest.raises(ApiError, match="404"):
        handle.delete()


def test_wait_polls_until_the_end_or_the_timeout() -> None:
    script = Script(
        httpx.Response(200, json=job()),
        httpx.Response(200, json=job()),
        httpx.Response(200, json={**job("succeeded", finished=2), "images": []}),
        httpx.Response(200, json=job("succeeded", finished=2)),
    )
    handle = script.client().job("job-1").wait(PATIENCE)
    assert len(handle.images()) == 2
    assert handle.state is State.SUCCEEDED
    assert handle.counts == Counts(2, 0, 0, 2, 0, 0)
    assert dict(script.requests[1].url.params) == {"wait": "20.0", "images": "none"}
    waiting = Script(*[httpx.Response(200, json=job())] * 2)
    with pytest.raises(TimeoutError, match="job-1 hasn't finished within 0 s"):
        waiting.client().job("job-1").wait(0)


def test_save_downloads_each_image_once_and_verifies_it(tmp_path: Path) -> None:
    script = Script(
        httpx.Response(200, json=job(finished=1)),
        httpx.Response(200, content=b"cut"),
        httpx.Response(200, content=DATA),
    )
    handle = script.client().job("job-1")
    (path,) = handle.save(tmp_path)
    assert path == tmp_path / "0000-prompt-0.png"
    assert path.read_bytes() == DATA
    assert handle.save(tmp_path) == [path]
    assert len(script.requests) == 3
    assert [image.state for image in handle.images()] == [State.SUCCEEDED, State.QUEUED]
    with pytest.raises(NotFound, match="image 1 of job job-1 is queued"):
        handle.download(1)


def test_a_wrong_checksum_raises_corrupt_download() -> None:
    script = Script(httpx.Response(200, json=job()), *[httpx.Response(200, content=b"x")] * 3)
    with pytest.raises(CorruptDownload):
        script.client().job("job-1").download(0)


def test_the_async_client_sends_the_same_requests(tmp_path: Path) -> None:
    script = Script(
        httpx.Response(502),
        httpx.Response(202, json=job("queued", finished=0)),
        httpx.Response(200, json={**job("succeeded", finished=2), "images": []}),
        httpx.Response(200, json=job("succeeded", finished=2)),
        httpx.Response(200, content=DATA),
        httpx.Response(200, content=DATA),
        httpx.Response(200, json=job("cancelled")),
        httpx.Response(204),
    )

    async def talk() -> None:
        async def pause(seconds: float) -> None:
            script.pauses.append(seconds)

        transport = httpx.MockTransport(script)
        async with AsyncClient("http://server", transport=transport, pause=pause) as client:
            handle = await client.submit("demo", ["a", "b"])
            assert (await handle.wait()).state is State.SUCCEEDED
            assert len(await handle.save(tmp_path)) == 2
            assert (await handle.cancel()).state is State.CANCELLED
            await handle.delete()

    asyncio.run(talk())
    assert len(script.pauses) == 1
    assert script.requests[-1].method == "DELETE"


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_sync_and_async_classes_have_the_same_api() -> None:
    assert public(Client) == public(AsyncClient)
    assert public(imagemill.Job) == public(imagemill.AsyncJob)


def test_server_and_key_default_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_SERVER", "http://far:9/")
    monkeypatch.setenv("IMAGEMILL_API_KEY", "secret")
    script = Script(httpx.Response(200, json=job()))
    with Client(transport=httpx.MockTransport(script)) as client:
        client.job("job-1")
        assert client.server == "http://far:9"
    assert script.requests[0].headers["Authorization"] == "Bearer secret"
    assert str(script.requests[0].url) == "http://far:9/v1/jobs/job-1"


@pytest.mark.parametrize("value", [None, "soon", "-1", "inf", ""])
def test_invalid_retry_after_is_ignored(value: str | None) -> None:
    assert retry_after(value) is None


def test_retry_after_in_seconds_and_as_a_date() -> None:
    assert retry_after("7") == 7.0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < (retry_after(later) or 0) <= 30
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0


def test_delays_grow_and_stay_bounded() -> None:
    delays = [backoff(attempt) for attempt in range(2000)]
    assert delays[0] <= 0.1
    assert all(LONGEST_DELAY / 2 <= delay <= LONGEST_DELAY for delay in delays[10:])


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code", ["import imagemill", "from imagemill import Client", "import imagemill.cli"]
)
def test_importing_loads_no_heavy_modules(code: str) -> None:
    heavy = {"torch", "diffusers", "redis", "fastapi"}
    heavy |= {"httpx", "PIL"} if "Client" not in code else set()
    modules = run_python(f"import sys\n{code}\nprint(*sys.modules)").split()
    assert not heavy & set(modules)
    assert len(modules) < 400


def test_unknown_names_raise_attribute_error() -> None:
    get: Callable[[str], object] = lambda name: getattr(imagemill, name)  # noqa: E731
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        get("Clinet")
