"""GET, waiting, listing, cancel, retry, delete: a job as its caller sees it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from service import waiting
from service.events import Watch
from tests.service.conftest import Deployment, pointers, working
from tests.waiting import PATIENCE, wait_until


def test_a_job_tells_its_story(mill: Deployment) -> None:
    job_id = mill.submit("a", "b", "c")["id"]
    made, failed, running = mill.worker.claim(3)
    data = mill.worker.finish(made)
    mill.worker.fail(failed, "the picture came out as NaN")
    job = mill.job(job_id)
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
    mill.worker.finish(running)
    job = mill.job(job_id)
    assert (job["state"], job["progress"], job["eta_seconds"]) == ("failed", 1, 0)
    assert job["queue_position"] is None
    assert job["finished"] >= job["started"] >= job["created"]


def test_progress_is_what_a_worker_measured(fresh: Deployment) -> None:
    job_id = fresh.submit("a", "b")["id"]
    first, second = fresh.worker.claim(2)
    fresh.store.beat("hand", {(first.key, first.token): 4, (second.key, second.token): 0}, 60)
    job = fresh.job(job_id)
    assert [image["step"] for image in job["images"]] == [4, 0]
    assert job["progress"] == pytest.approx(4 / 16)
    fresh.worker.finish(first)
    assert fresh.job(job_id)["progress"] == pytest.approx(0.5)


def test_a_job_never_contradicts_its_images(fresh: Deployment) -> None:
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


def test_the_position_counts_images_that_go_before(fresh: Deployment) -> None:
    first, second = fresh.submit("a", n=3), fresh.submit("b")
    assert first["queue_position"] == 0
    assert isinstance(second["queue_position"], int)


def test_the_eta_is_measured_or_unknown(fresh: Deployment) -> None:
    job_id = fresh.submit("a", "b")["id"]
    assert fresh.job(job_id)["eta_seconds"] is None
    info = {"model": "demo", "state": "ready", "pixel_steps_per_second": 4 * 128 * 128}
    fresh.store.register("w1", info, 60)
    fresh.store.register("w2", {**info, "state": "starting"}, 60)
    wait_until(lambda: fresh.job(job_id)["eta_seconds"] == 4.0)


def test_jobs_that_are_not_there_are_404(mill: Deployment) -> None:
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
            answer = mill.client.request(method, f"/v1/jobs/{job_id}{path}")
            assert answer.status_code == 404, (job_id, path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"


def test_the_etag_spares_the_caller_what_it_has(mill: Deployment) -> None:
    job_id = mill.submit("a")["id"]
    path = f"/v1/jobs/{job_id}"
    tag = mill.client.get(path).headers["etag"]
    same = mill.client.get(path, headers={"If-None-Match": tag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    mill.worker.finish_all()
    other = mill.client.get(path, headers={"If-None-Match": f'"x", {tag}'})
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
    monkeypatch.setattr(waiting, "RECHECK_SECONDS", PATIENCE)
    return woken


def test_a_wait_ends_when_the_job_does(mill: Deployment, woken: Woken) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a", "b")["id"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(mill.client.get, f"/v1/jobs/{job_id}?wait=60")
        wait_until(lambda: woken.waits)
        first, second = mill.worker.claim(2)
        mill.worker.finish(first)
        wait_until(lambda: woken)
        assert not answer.done()
        mill.worker.finish(second)
        job = answer.result(PATIENCE).json()
    assert job["state"] == "succeeded"
    assert woken and all(woken)


def test_a_wait_with_an_etag_ends_at_any_news(mill: Deployment, woken: Woken) -> None:
    mill.worker.finish_all()
    path = f"/v1/jobs/{mill.submit('a', 'b')['id']}"
    tag = mill.client.get(path).headers["etag"]
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(mill.client.get, f"{path}?wait=60", headers={"If-None-Match": tag})
        wait_until(lambda: woken.waits)
        (lease, *_) = mill.worker.claim(1)
        mill.worker.finish(lease)
        answer = told.result(PATIENCE)
    assert answer.status_code == 200
    assert woken and all(woken)
    assert answer.json()["state"] in ("queued", "running")


def test_a_job_can_be_told_without_its_images(fresh: Deployment) -> None:
    job_id = fresh.submit("a", "b", steps=4)["id"]
    info = {"model": "demo", "state": "ready", "pixel_steps_per_second": 4 * 128 * 128}
    fresh.store.register("w1", info, 60)
    wait_until(lambda: fresh.job(job_id)["eta_seconds"])
    whole = fresh.job(job_id)
    bare = fresh.client.get(f"/v1/jobs/{job_id}?images=none").json()
    assert bare == {**whole, "images": []}
    assert bare["eta_seconds"] == 2.0
    assert fresh.client.get(f"/v1/jobs/{job_id}?images=some").status_code == 422


def test_a_wait_without_news_ends_in_time(mill: Deployment) -> None:
    path = f"/v1/jobs/{mill.submit('a')['id']}"
    tag = mill.client.get(path).headers["etag"]
    assert mill.client.get(f"{path}?wait=0.05").json()["state"] == "queued"
    known = mill.client.get(f"{path}?wait=0.05", headers={"If-None-Match": tag})
    assert known.status_code == 304


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "x", "", "1&wiat=2"])
def test_a_wait_that_cannot_be_is_422(mill: Deployment, wait: str) -> None:
    job_id = mill.submit("a")["id"]
    answer = mill.client.get(f"/v1/jobs/{job_id}?wait={wait}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith("/query/")


def test_jobs_are_listed_newest_first_in_pages(fresh: Deployment) -> None:
    ids = [fresh.submit(f"prompt {number}")["id"] for number in range(5)]
    first = fresh.client.get("/v1/jobs?limit=2").json()
    second = fresh.client.get("/v1/jobs", params={"limit": 2, "cursor": first["next"]}).json()
    third = fresh.client.get("/v1/jobs", params={"limit": 2, "cursor": second["next"]}).json()
    listed = [job["id"] for page in (first, second, third) for job in page["data"]]
    assert listed == ids[::-1]
    assert third["next"] is None
    assert "images" not in first["data"][0] and first["data"][0]["counts"]["total"] == 1


def test_the_list_can_be_narrowed_to_a_state(fresh: Deployment) -> None:
    done = fresh.submit("a")["id"]
    fresh.worker.finish_all()
    waiting = fresh.submit("b")["id"]

    def listed(state: str) -> list[str]:
        return [job["id"] for job in fresh.client.get(f"/v1/jobs?state={state}").json()["data"]]

    assert (listed("succeeded"), listed("queued"), listed("failed")) == ([done], [waiting], [])


@pytest.mark.parametrize("query", ["state=odd", "limit=0", "limit=201", "limit=x", "page=1"])
def test_a_list_that_cannot_be_is_422(mill: Deployment, query: str) -> None:
    answer = mill.client.get(f"/v1/jobs?{query}")
    assert (answer.status_code, len(answer.json()["errors"])) == (422, 1)


@pytest.mark.parametrize("cursor", ["x", "", "%00", "-1", "1%0A", "9" * 50, "ä", "٣", "²", "inf"])
def test_a_cursor_that_we_did_not_give_is_refused(mill: Deployment, cursor: str) -> None:
    answer = mill.client.get(f"/v1/jobs?cursor={cursor}")
    assert (answer.status_code, pointers(answer)) == (422, ["/query/cursor"])


def test_cancel_stops_what_is_not_finished(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a", "b", "c")["id"]
    first, _ = mill.worker.claim(2)
    mill.worker.finish(first)
    answer = mill.client.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 200
    states = [image["state"] for image in answer.json()["images"]]
    assert states[0] == "succeeded" and states[2] == "cancelled"


def test_retry_runs_only_what_failed(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a", "b")["id"]
    first, second = mill.worker.claim(2)
    mill.worker.finish(first)
    mill.worker.fail(second)
    assert mill.job(job_id)["state"] == "failed"
    answer = mill.client.post(f"/v1/jobs/{job_id}/retry")
    assert answer.status_code == 202
    assert [image["state"] for image in answer.json()["images"]] == ["succeeded", "queued"]
    mill.worker.finish_all()
    assert mill.job(job_id)["state"] == "succeeded"


def test_retry_without_failures_is_409(mill: Deployment) -> None:
    job_id = mill.submit("a")["id"]
    answer = mill.client.post(f"/v1/jobs/{job_id}/retry")
    assert (answer.status_code, answer.json()["title"]) == (409, "Conflict")


def test_delete_removes_the_job(mill: Deployment) -> None:
    mill.worker.finish_all()
    job_id = mill.submit("a")["id"]
    mill.worker.finish_all()
    answer = mill.client.delete(f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert mill.client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert mill.client.get(f"/v1/jobs/{job_id}/images/0").status_code == 404
    assert mill.client.delete(f"/v1/jobs/{job_id}").status_code == 404


def test_metadata_comes_back_as_it_went(mill: Deployment) -> None:
    metadata = {"": None, "n": -(10**4000), "f": 1.5e-7, "deep": [{"ä": ["\u2028", "\x00"]}]}
    job = mill.submit("a", metadata=metadata)
    assert mill.job(job["id"])["metadata"] == metadata
    listed = mill.client.get("/v1/jobs?limit=1").json()["data"][0]
    assert listed["metadata"] == metadata
