"""Jobs over HTTP: get, wait, list, cancel, retry, delete."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from jobs.reports import WorkerReport
from service.read import long_poll
from service.read.events import Watch
from tests.service.conftest import Deployment, pointers, working
from tests.waiting import PATIENCE, wait_until


def test_job_view_from_submit_to_end(deployment: Deployment) -> None:
    job_id = deployment.submit("a", "b", "c")["id"]
    finished, failed, running = deployment.worker.claim(3)
    data = deployment.worker.finish(finished)
    deployment.worker.fail(failed, "the picture came out as NaN")
    job = deployment.job(job_id)
    assert job["state"] == "running"
    assert job["counts"] == {
        "total": 3,
        "queued": 0,
        "running": 1,
        "succeeded": 1,
        "failed": 1,
        "cancelled": 0,
    }
    good, bad, going = job["images"]
    assert (good["state"], good["step"], good["size"]) == ("succeeded", 8, len(data))
    assert good["url"] == f"/v1/jobs/{job_id}/images/0"
    assert len(good["sha256"]) == 64 and good["media_type"] == "image/png"
    assert (bad["state"], bad["url"], bad["error"]) == (
        "failed",
        None,
        "the picture came out as NaN",
    )
    assert (going["state"], going["url"], going["sha256"]) == ("running", None, None)
    deployment.worker.finish(running)
    job = deployment.job(job_id)
    assert (job["state"], job["progress"], job["eta_seconds"]) == ("failed", 1, 0)
    assert job["queue_position"] is None
    assert job["finished"] >= job["started"] >= job["created"]


def test_progress_is_reported_by_the_worker(fresh: Deployment) -> None:
    job_id = fresh.submit("a", "b")["id"]
    first, second = fresh.worker.claim(2)
    fresh.store.beat("hand", {(first.key, first.token): 4, (second.key, second.token): 0}, 60)
    job = fresh.job(job_id)
    assert [image["step"] for image in job["images"]] == [4, 0]
    assert job["progress"] == pytest.approx(4 / 16)
    fresh.worker.finish(first)
    assert fresh.job(job_id)["progress"] == pytest.approx(0.5)


def test_job_and_images_are_consistent(fresh: Deployment) -> None:
    path = f"/v1/jobs/{fresh.submit('a', n=20)['id']}"
    looks = []
    with working(fresh):
        while not looks or looks[-1]["state"] not in ("succeeded", "failed"):
            looks.append(fresh.client.get(path).json())
    for job in looks:
        states = [image["state"] for image in job["images"]]
        counted = {name: states.count(name) for name in job["counts"] if name != "total"}
        assert {**counted, "total": 20} == job["counts"]
        assert (job["finished"] is not None) == (job["state"] == "succeeded")


def test_position_counts_images_ahead(fresh: Deployment) -> None:
    first, second = fresh.submit("a", n=3), fresh.submit("b")
    assert first["queue_position"] == 0
    assert isinstance(second["queue_position"], int)


def test_eta_is_null_until_measured(fresh: Deployment) -> None:
    job_id = fresh.submit("a", "b")["id"]
    assert fresh.job(job_id)["eta_seconds"] is None
    report = WorkerReport("demo", "ready", pixel_steps_per_second=4 * 128 * 128)
    fresh.store.register("w1", report, 60)
    fresh.store.register("w2", replace(report, state="starting"), 60)
    wait_until(lambda: fresh.job(job_id)["eta_seconds"] == 4.0)


def test_unknown_jobs_are_404(deployment: Deployment) -> None:
    for job_id in ("nope", "a" * 500, "%00", "%ED%A0%80", "..%2F..", "{x}", "*"):
        for method, path in [
            ("GET", ""),
            ("GET", "?wait=1"),
            ("DELETE", ""),
            ("POST", "/cancel"),
            ("POST", "/retry"),
            ("GET", "/images/0"),
            ("GET", "/images.zip"),
            ("GET", "/sheet.png"),
        ]:
            response = deployment.client.request(method, f"/v1/jobs/{job_id}{path}")
            assert response.status_code == 404, (job_id, path, response.text)
            assert response.headers["content-type"] == "application/problem+json"


def test_current_etag_is_304(deployment: Deployment) -> None:
    job_id = deployment.submit("a")["id"]
    path = f"/v1/jobs/{job_id}"
    tag = deployment.client.get(path).headers["etag"]
    same = deployment.client.get(path, headers={"If-None-Match": tag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    deployment.worker.finish_all()
    other = deployment.client.get(path, headers={"If-None-Match": f'"x", {tag}'})
    assert other.status_code == 200 and other.headers["etag"] != tag


class Woken(list[bool]):
    """Of every wait for news, whether news ended it; `waits` have begun."""

    waits = 0


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> Woken:
    """Notes every wait for news; without any news one would last PATIENCE."""
    woken = Woken()
    news_within = Watch.news_within

    async def noted(watch: Watch, seconds: float) -> bool:
        woken.waits += 1
        woken.append(await news_within(watch, seconds))
        return woken[-1]

    monkeypatch.setattr(Watch, "news_within", noted)
    monkeypatch.setattr(long_poll, "RECHECK_SECONDS", PATIENCE)
    return woken


def test_wait_ends_with_the_job(deployment: Deployment, woken: Woken) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a", "b")["id"]
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(deployment.client.get, f"/v1/jobs/{job_id}?wait=60")
        wait_until(lambda: woken.waits)
        first, second = deployment.worker.claim(2)
        deployment.worker.finish(first)
        wait_until(lambda: woken)
        assert not response.done()
        deployment.worker.finish(second)
        job = response.result(PATIENCE).json()
    assert job["state"] == "succeeded"
    assert woken and all(woken)


def test_wait_with_etag_ends_at_any_change(deployment: Deployment, woken: Woken) -> None:
    deployment.worker.finish_all()
    path = f"/v1/jobs/{deployment.submit('a', 'b')['id']}"
    tag = deployment.client.get(path).headers["etag"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            deployment.client.get, f"{path}?wait=60", headers={"If-None-Match": tag}
        )
        wait_until(lambda: woken.waits)
        (lease, *_) = deployment.worker.claim(1)
        deployment.worker.finish(lease)
        response = waiting.result(PATIENCE)
    assert response.status_code == 200
    assert woken and all(woken)
    assert response.json()["state"] in ("queued", "running")


def test_job_without_its_images(fresh: Deployment) -> None:
    job_id = fresh.submit("a", "b", steps=4)["id"]
    report = WorkerReport("demo", "ready", pixel_steps_per_second=4 * 128 * 128)
    fresh.store.register("w1", report, 60)
    wait_until(lambda: fresh.job(job_id)["eta_seconds"])
    whole = fresh.job(job_id)
    bare = fresh.client.get(f"/v1/jobs/{job_id}?images=none").json()
    assert bare == {**whole, "images": []}
    assert bare["eta_seconds"] == 2.0
    assert fresh.client.get(f"/v1/jobs/{job_id}?images=some").status_code == 422


def test_wait_without_change_times_out(deployment: Deployment) -> None:
    path = f"/v1/jobs/{deployment.submit('a')['id']}"
    tag = deployment.client.get(path).headers["etag"]
    assert deployment.client.get(f"{path}?wait=0.05").json()["state"] == "queued"
    known = deployment.client.get(f"{path}?wait=0.05", headers={"If-None-Match": tag})
    assert known.status_code == 304


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "x", "", "1&wiat=2"])
def test_invalid_wait_is_422(deployment: Deployment, wait: str) -> None:
    job_id = deployment.submit("a")["id"]
    response = deployment.client.get(f"/v1/jobs/{job_id}?wait={wait}")
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"].startswith("/query/")


def test_jobs_are_listed_newest_first_in_pages(fresh: Deployment) -> None:
    ids = [fresh.submit(f"prompt {number}")["id"] for number in range(5)]
    first = fresh.client.get("/v1/jobs?limit=2").json()
    second = fresh.client.get("/v1/jobs", params={"limit": 2, "cursor": first["next"]}).json()
    third = fresh.client.get("/v1/jobs", params={"limit": 2, "cursor": second["next"]}).json()
    listed = [job["id"] for page in (first, second, third) for job in page["data"]]
    assert listed == ids[::-1]
    assert third["next"] is None
    assert "images" not in first["data"][0] and first["data"][0]["counts"]["total"] == 1


def test_list_can_be_filtered_by_state(fresh: Deployment) -> None:
    done = fresh.submit("a")["id"]
    fresh.worker.finish_all()
    long_poll = fresh.submit("b")["id"]

    def listed(state: str) -> list[str]:
        return [job["id"] for job in fresh.client.get(f"/v1/jobs?state={state}").json()["data"]]

    assert (listed("succeeded"), listed("queued"), listed("failed")) == ([done], [long_poll], [])


@pytest.mark.parametrize("query", ["state=odd", "limit=0", "limit=201", "limit=x", "page=1"])
def test_invalid_list_query_is_422(deployment: Deployment, query: str) -> None:
    response = deployment.client.get(f"/v1/jobs?{query}")
    assert (response.status_code, len(response.json()["errors"])) == (422, 1)


@pytest.mark.parametrize("cursor", ["x", "", "%00", "-1", "1%0A", "9" * 50, "ä", "٣", "²", "inf"])
def test_forged_cursor_is_422(deployment: Deployment, cursor: str) -> None:
    response = deployment.client.get(f"/v1/jobs?cursor={cursor}")
    assert (response.status_code, pointers(response)) == (422, ["/query/cursor"])


def test_cancel_stops_unfinished_images(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a", "b", "c")["id"]
    first, _ = deployment.worker.claim(2)
    deployment.worker.finish(first)
    response = deployment.client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 200
    states = [image["state"] for image in response.json()["images"]]
    assert states[0] == "succeeded" and states[2] == "cancelled"


def test_retry_only_runs_failed_images(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a", "b")["id"]
    first, second = deployment.worker.claim(2)
    deployment.worker.finish(first)
    deployment.worker.fail(second)
    assert deployment.job(job_id)["state"] == "failed"
    response = deployment.client.post(f"/v1/jobs/{job_id}/retry")
    assert response.status_code == 202
    assert [image["state"] for image in response.json()["images"]] == ["succeeded", "queued"]
    deployment.worker.finish_all()
    assert deployment.job(job_id)["state"] == "succeeded"


def test_retry_without_failures_is_409(deployment: Deployment) -> None:
    job_id = deployment.submit("a")["id"]
    response = deployment.client.post(f"/v1/jobs/{job_id}/retry")
    assert (response.status_code, response.json()["title"]) == (409, "Conflict")


def test_delete_removes_the_job(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    job_id = deployment.submit("a")["id"]
    deployment.worker.finish_all()
    response = deployment.client.delete(f"/v1/jobs/{job_id}")
    assert (response.status_code, response.content) == (204, b"")
    assert deployment.client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert deployment.client.get(f"/v1/jobs/{job_id}/images/0").status_code == 404
    assert deployment.client.delete(f"/v1/jobs/{job_id}").status_code == 404


def test_metadata_is_returned_unchanged(deployment: Deployment) -> None:
    metadata = {"": None, "n": -(10**4000), "f": 1.5e-7, "deep": [{"ä": ["\u2028", "\x00"]}]}
    job = deployment.submit("a", metadata=metadata)
    assert deployment.job(job["id"])["metadata"] == metadata
    listed = deployment.client.get("/v1/jobs?limit=1").json()["data"][0]
    assert listed["metadata"] == metadata
