"""A job's event stream: everything once, in order, and resumable."""

import json
from collections.abc import Iterator
from itertools import islice

import httpx
import pytest
import redis

from jobs.errors import NotFound
from jobs.queue.keys import Keys
from jobs.runtime.embedded_queue import EmbeddedServer
from service.read import job_stream
from tests import web
from tests.service.conftest import Deployment, deployed
from tests.service.live import listening
from tests.waiting import PATIENCE, wait_until


@pytest.fixture(scope="module")
def live(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, httpx.Client]]:
    """A service that listens on a port, and a client for it."""
    with (
        deployed(server.url, tmp_path_factory.mktemp("live"), start=False) as service,
        listening(service.client.app) as address,
        web.Client(base_url=address, timeout=PATIENCE) as client,
    ):
        service.client = client
        yield service, client


Frame = tuple[str, str, dict]


def frames(response: httpx.Response) -> Iterator[Frame]:
    """(id, event, data) of each frame; comments are (``, `comment`, {})."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name or "comment"] = value
        elif "comment" in fields or "" in fields:
            yield "", "comment", {}
            fields = {}
        else:
            yield fields["id"], fields["event"], json.loads(fields["data"])
            fields = {}


def follow(client: httpx.Client, job: dict, after: str | None = None) -> list[Frame]:
    """All frames until the stream ends, without heartbeats."""
    headers = {"Last-Event-ID": after} if after else {}
    with client.stream("GET", job["urls"]["events"], headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return [frame for frame in frames(response) if frame[1] != "comment"]


def indexes(seen: list[Frame]) -> list[int]:
    """Indexes of the image frames."""
    return [data["index"] for _, kind, data in seen if kind == "image"]


def test_each_image_is_sent_once_until_the_job_ends(live: tuple) -> None:
    deployment, client = live
    job = deployment.submit("a", "b", "c")
    with client.stream("GET", job["urls"]["events"]) as response:
        stream = frames(response)
        seen = [next(stream)]
        assert (seen[0][1], seen[0][2]["state"], seen[0][2]["id"]) == ("job", "queued", job["id"])
        first, second, third = deployment.worker.claim(3)
        deployment.worker.finish(first)
        deployment.worker.fail(second, "no")
        deployment.worker.finish(third)
        seen += stream
    images = [data for _, kind, data in seen if kind == "image"]
    assert sorted(indexes(seen)) == [0, 1, 2]
    assert {image["index"]: image["state"] for image in images} == {
        0: "succeeded",
        1: "failed",
        2: "succeeded",
    }
    assert all(image["url"] or image["error"] == "no" for image in images)
    assert (seen[-1][1], seen[-1][2]["state"]) == ("job", "failed")
    ids = [tuple(map(int, frame[0].split("-"))) for frame in seen]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)


def test_late_reader_gets_everything(live: tuple) -> None:
    deployment, client = live
    job = deployment.submit("a", n=3)
    deployment.worker.finish_all()
    seen = follow(client, job)
    assert sorted(indexes(seen)) == [0, 1, 2]
    assert seen[-1][2]["state"] == "succeeded"


def test_reader_can_resume_after_any_frame(live: tuple) -> None:
    deployment, client = live
    job = deployment.submit("a", n=4)
    for lease in deployment.worker.claim(4):
        deployment.worker.finish(lease)
    whole = follow(client, job)
    for place in range(len(whole) - 1):
        assert follow(client, job, after=whole[place][0]) == whole[place + 1 :]


def test_reader_can_leave_and_resume_a_running_job(live: tuple) -> None:
    deployment, client = live
    job = deployment.submit("a", n=4)
    leases = deployment.worker.claim(4)
    with client.stream("GET", job["urls"]["events"]) as response:
        stream = frames(response)
        deployment.worker.finish(leases[0])
        seen = []
        while not indexes(seen):
            seen.append(next(stream))
    for lease in leases[1:]:
        deployment.worker.finish(lease)
    seen += follow(client, job, after=seen[-1][0])
    assert sorted(indexes(seen)) == [0, 1, 2, 3]


def test_nothing_follows_the_last_frame(live: tuple) -> None:
    deployment, client = live
    job = deployment.submit("a")
    deployment.worker.finish_all()
    last = follow(client, job)[-1][0]
    response = client.get(job["urls"]["events"], headers={"Last-Event-ID": last})
    assert (response.status_code, response.content) == (204, b"")


def trim(server: EmbeddedServer, deployment: Deployment, keep: int) -> None:
    """Drop all but the last events, as further events of other jobs would."""
    with redis.Redis.from_url(server.url, protocol=2) as raw:
        raw.xtrim(Keys(deployment.pool)("events"), maxlen=keep, approximate=False)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("has_seen", [0, -1, None])
def test_resuming_from_a_dropped_event_sends_the_current_state(
    live: tuple, server: EmbeddedServer, has_seen: int | None, keep: int
) -> None:
    deployment, client = live
    job = deployment.submit("a", "b")
    deployment.worker.finish_all()
    last = None if has_seen is None else follow(client, job)[has_seen][0]
    client.post(deployment.submit("of another caller")["urls"]["cancel"])
    trim(server, deployment, keep)
    ((place, kind, data),) = follow(client, job, after=last)
    assert (kind, data["state"], data["counts"]["succeeded"]) == ("job", "succeeded", 2)
    response = client.get(job["urls"]["events"], headers={"Last-Event-ID": place})
    assert response.status_code == 204  # otherwise a browser would reconnect forever


def test_missed_images_of_a_running_job_restart_the_stream(
    live: tuple, server: EmbeddedServer
) -> None:
    deployment, client = live
    job = deployment.submit("a", n=3)
    first, second, third = deployment.worker.claim(3)
    deployment.worker.finish(first)
    with client.stream("GET", job["urls"]["events"]) as response:
        seen = [next(frames(response))]
    deployment.worker.finish(second)
    trim(server, deployment, keep=1)
    deployment.worker.finish(third)
    seen = follow(client, job, after=seen[-1][0])
    assert [kind for _, kind, _ in seen] == ["job", "image", "image", "job"]
    assert seen[0][2]["counts"]["succeeded"] == 3
    assert indexes(seen) == [1, 2]


def test_deleting_a_job_ends_its_stream(live: tuple) -> None:
    deployment, client = live
    job = deployment.submit("a")
    with client.stream("GET", job["urls"]["events"]) as response:
        stream = frames(response)
        next(stream)
        client.delete(job["urls"]["self"])
        *_, last = stream
    assert last[1:] == ("deleted", {"id": job["id"]})


def test_deleting_a_job_while_frames_are_built_ends_its_stream(
    live: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, client = live
    job = deployment.submit("a")
    deployment.worker.finish_all()

    def gone(*_: object) -> None:
        raise NotFound("no job")

    monkeypatch.setattr(deployment.store, "image", gone)
    assert [kind for _, kind, _ in follow(client, job)] == ["job", "deleted"]


def test_heartbeats_keep_a_quiet_stream_alive(live: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, client = live
    monkeypatch.setattr(job_stream, "HEARTBEAT_SECONDS", 0.05)
    job = deployment.submit("a")
    with client.stream("GET", job["urls"]["events"]) as response:
        kinds = [kind for _, kind, _ in islice(frames(response), 4)]
    assert "comment" in kinds


def test_disconnected_reader_is_removed(live: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment, client = live
    monkeypatch.setattr(job_stream, "HEARTBEAT_SECONDS", 0.05)
    job = deployment.submit("a")
    with client.stream("GET", job["urls"]["events"]) as response:
        stream = frames(response)
        next(stream)
        assert "imagemill_waits 1.0" in client.get("/metrics").text
    wait_until(lambda: "imagemill_waits 0.0" in client.get("/metrics").text)


def test_slow_reader_is_disconnected_and_can_resume(
    live: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, client = live
    monkeypatch.setattr(job_stream, "MAX_UNREAD", 0)
    job = deployment.submit("a", n=2)
    seen: list[Frame] = []
    with client.stream("GET", job["urls"]["events"]) as response:
        stream = frames(response)
        seen.append(next(stream))
        deployment.worker.finish_all()
        seen += stream
    monkeypatch.undo()
    seen += follow(client, job, after=seen[-1][0])
    assert sorted(indexes(seen)) == [0, 1]


@pytest.mark.parametrize("header", ["x", "1", "-1-0", "1-2-3", "9" * 30 + "-0"])
def test_invalid_last_event_id_is_400(live: tuple, header: str) -> None:
    deployment, client = live
    job = deployment.submit("a")
    response = client.get(job["urls"]["events"], headers={"Last-Event-ID": header})
    assert response.status_code == 400


def test_unknown_job_is_404(live: tuple) -> None:
    _, client = live
    assert client.get("/v1/jobs/nope/events").status_code == 404
