"""Jobs of the client: progress, saving, listing, unusual ids and keys."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from imagemill import ApiError, AsyncClient, Client, Progress
from imagemill.client.errors import InvalidInput
from imagemill.client.protocol import DOWNLOADS_AT_ONCE
from jobs.errors import ImagemillError
from jobs.job import Counts, State
from tests.imagemill.test_client import DATA, Script, job
from tests.waiting import PATIENCE, wait_until


def test_wait_reports_progress_when_it_changes() -> None:
    etag = {"ETag": "W/7"}
    script = Script(
        httpx.Response(200, json=job(finished=0)),
        httpx.Response(
            200, json={**job(finished=0), "images": [], "eta_seconds": 4.5}, headers=etag
        ),
        httpx.Response(304),
        httpx.Response(200, json={**job("succeeded", finished=2), "images": []}),
        httpx.Response(200, json=job("succeeded", finished=2)),
    )
    reports: list[Progress] = []
    handle = script.client().job("job-1").wait(PATIENCE, on_progress=reports.append)
    assert [(report.state, report.share, report.eta_seconds) for report in reports] == [
        (State.RUNNING, 0.0, 4.5),
        (State.SUCCEEDED, 1.0, None),
    ]
    assert reports[0].counts == Counts(2, 2, 0, 0, 0, 0)
    assert [request.headers.get("If-None-Match") for request in script.requests[1:4]] == [
        None,
        "W/7",
        "W/7",
    ]
    assert "wait" not in script.requests[1].url.params
    assert len(handle.images()) == 2


class Crowd:
    """A transport that counts concurrent downloads and can refuse one of them."""

    def __init__(self, total: int, refused: int | None = None) -> None:
        self.job, self.refused = job("succeeded", finished=total, total=total), refused
        self.now, self.most, self.asked = 0, 0, 0
        self._lock, self._refusal = threading.Lock(), threading.Event()

    def _answer(self, request: httpx.Request) -> httpx.Response | None:
        """None for an image that isn't refused."""
        if "/images/" not in request.url.path:
            return httpx.Response(200, json=self.job)
        with self._lock:
            self.asked += 1
            self.now += 1
            self.most = max(self.most, self.now)
        return httpx.Response(410) if request.url.path.endswith(f"/{self.refused}") else None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        refusal = self._answer(request)
        if "/images/" in request.url.path:
            wait_until(lambda: self.most >= DOWNLOADS_AT_ONCE)
            if refusal is not None:
                self._refusal.set()
            elif self.refused is not None:
                assert self._refusal.wait(PATIENCE)
            with self._lock:
                self.now -= 1
        return refusal or httpx.Response(200, content=DATA)

    async def later(self, request: httpx.Request) -> httpx.Response:
        refusal = self._answer(request)
        if "/images/" in request.url.path:
            async with asyncio.timeout(PATIENCE):
                while self.most < DOWNLOADS_AT_ONCE:
                    await asyncio.sleep(0)
            self.now -= 1
        return refusal or httpx.Response(200, content=DATA)


def test_save_limits_concurrent_downloads(tmp_path: Path) -> None:
    crowd = Crowd(9)
    with Client("http://server", transport=httpx.MockTransport(crowd)) as client:
        paths = client.job("job-1").save(tmp_path / "new" / "out")
    assert [path.name for path in paths] == [f"000{n}-prompt-{n}.png" for n in range(9)]
    assert (crowd.most, crowd.asked) == (DOWNLOADS_AT_ONCE, 9)
    assert all(path.read_bytes() == DATA for path in paths)


def test_async_save_limits_downloads_and_writes_on_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(9)
    writers: set[int] = set()
    write_bytes = Path.write_bytes

    def noted(path: Path, data: bytes) -> int:
        writers.add(threading.get_ident())
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", noted)

    async def talk() -> list[Path]:
        transport = httpx.MockTransport(crowd.later)
        async with AsyncClient("http://server", transport=transport) as client:
            return await (await client.job("job-1")).save(tmp_path)

    paths = asyncio.run(talk())
    assert [path.name for path in paths] == [f"000{n}-prompt-{n}.png" for n in range(9)]
    assert (crowd.most, crowd.asked) == (DOWNLOADS_AT_ONCE, 9)
    assert writers and threading.get_ident() not in writers


def test_a_failed_download_ends_save(tmp_path: Path) -> None:
    """Downloads in progress may finish, but no more are started."""

    async def talk() -> None:
        transport = httpx.MockTransport(later.later)
        async with AsyncClient("http://server", transport=transport) as client:
            handle = await client.job("job-1")
            with pytest.raises(ApiError, match="410"):
                await handle.save(tmp_path / "later")

    total = 600
    now, later = Crowd(total, refused=0), Crowd(total, refused=0)
    with (
        Client("http://server", transport=httpx.MockTransport(now)) as client,
        pytest.raises(ApiError, match="410"),
    ):
        client.job("job-1").save(tmp_path / "now")
    asyncio.run(talk())
    assert now.asked < total and later.asked < total


def test_jobs_are_listed_by_page_without_images() -> None:
    listed = [{**job("failed"), "id": f"job-{n}"} for n in range(3)]
    for one in listed:
        del one["images"]
    script = Script(
        httpx.Response(200, json={"data": listed[:2], "next": "7"}),
        httpx.Response(200, json={"data": listed[2:], "next": None}),
    )
    found = list(script.client().jobs(state=State.FAILED))
    assert [one.id for one in found] == ["job-0", "job-1", "job-2"]
    assert [dict(request.url.params) for request in script.requests] == [
        {"state": "failed", "limit": "100"},
        {"state": "failed", "limit": "100", "cursor": "7"},
    ]
    with pytest.raises(
        ImagemillError, match=r"job-0 was listed without its images; call refresh\(\)"
    ):
        found[0].images()


def test_models_and_workers_in_both_clients() -> None:
    model: dict[str, Any] = {
        "id": "demo",
        "dtype": "float32",
        "placement": "replica",
        "defaults": {"steps": 8},
        "limits": {"max_steps": 100},
        "card": None,
        "ready_workers": 1,
        "queued": 3,
        "owned_by": "imagemill",
    }
    worker = {"id": "w", "model": "demo", "state": "ready", "images_done": 5, "odd": 1}

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/v1/jobs":
            return httpx.Response(200, json={"data": [job()], "next": None})
        return httpx.Response(200, json={"data": [model if path == "/v1/models" else worker]})

    async def talk() -> tuple[object, ...]:
        async with AsyncClient("http://server", transport=httpx.MockTransport(answer)) as client:
            jobs = [one.id async for one in client.jobs()]
            return jobs, await client.models(), await client.workers()

    client = Client("http://server", transport=httpx.MockTransport(answer))
    (offered,), (works,) = client.models(), client.workers()
    assert (offered.id, offered.ready_workers, offered.defaults["steps"]) == ("demo", 1, 8)
    assert (works.model, works.images_done, works.device, works.raw["odd"]) == ("demo", 5, None, 1)
    assert asyncio.run(talk()) == (["job-1"], [offered], [works])


def test_fields_that_older_servers_do_not_report_are_none() -> None:
    newer = job(total=1)
    newer["images"][0] |= {"reproducible": False, "format": "webp"}
    script = Script(
        httpx.Response(200, json=newer),
        httpx.Response(200, json={"prompt": "prompt 0", "scheduler": "Euler"}),
        httpx.Response(200, json=job(total=1)),
    )
    handle = script.client().job("job-1")
    assert (handle.images()[0].reproducible, handle.images()[0].format) == (False, "webp")
    assert handle.recipe(0)["scheduler"] == "Euler"
    assert script.requests[1].url.path == "/v1/jobs/job-1/images/0/recipe"
    older = handle.refresh().images()[0]
    assert (older.reproducible, older.format) == (None, None)


@pytest.mark.parametrize("key", ["ä", "two words", "line\n", "\udcff", "x" * 256])
def test_keys_that_do_not_fit_a_header_are_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match="API key"):
        Client("http://server", api_key=key)
    script = Script()
    with pytest.raises(InvalidInput, match="idempotency key"):
        script.client().submit("demo", "a", idempotency_key=key)


@pytest.mark.parametrize(
    ("job_id", "path"),
    [
        ("a/b?c#d", b"/v1/jobs/a%2Fb%3Fc%23d"),
        ("a\nb", b"/v1/jobs/a%0Ab"),
        ("\udcff", b"/v1/jobs/%3F"),
    ],
)
def test_job_ids_are_quoted_as_one_path_segment(job_id: str, path: bytes) -> None:
    script = Script(httpx.Response(404))
    with pytest.raises(ApiError, match="404"):
        script.client().job(job_id)
    assert script.requests[0].url.raw_path == path
