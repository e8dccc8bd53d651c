"""The event stream of a job: everything once, in order, from where a reader left."""

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
    """A deployment that listens, and a client to it."""
    with (
        deployed(server.url, tmp_path_factory.mktemp("live"), start=False) as found,
        listening(found.client.app) as address,
        web.Client(base_url=address, timeout=PATIENCE) as client,
    ):
        found.client = client
        yield found, client


Frame = tuple[str, str, dict]


def frames(answer: httpx.Response) -> Iterator[Frame]:
    """(id, event, data) of each frame; comments are (``, `comment`, {})."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
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
    with client.stream("GET", job["urls"]["events"], headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [frame for frame in frames(answer) if frame[1] != "comment"]


def made(seen: list[Frame]) -> list[int]:
    """Indices that image frames told of."""
    return [data["index"] for _, kind, data in seen if kind == "image"]


def test_it_tells_each_image_once_and_ends_with_the_job(live: tuple) -> None:
    mill, client = live
    job = mill.submit("a", "b", "c")
    with client.stream("GET", job["urls"]["events"]) as answer:
        stream = frames(answer)
        seen = [next(stream)]
        assert (seen[0][1], seen[0][2]["state"], seen[0][2]["id"]) == ("job", "queued", job["id"])
        first, second, third = mill.worker.claim(3)
        mill.worker.finish(first)
        mill.worker.fail(second, "no")
        mill.worker.finish(third)
        seen += stream
    told = [data for _, kind, data in seen if kind == "image"]
    assert sorted(made(seen)) == [0, 1, 2]
    assert {one["index"]: one["state"] for one in told} == {
        0: "succeeded",
        1: "failed",
        2: "succeeded",
    }
    assert all(one["url"] or one["error"] == "no" for one in told)
    assert (seen[-1][1], seen[-1][2]["state"]) == ("job", "failed")
    ids = [tuple(map(int, one[0].split("-"))) for one in seen]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)


def test_a_late_reader_is_told_everything(live: tuple) -> None:
    mill, client = live
    job = mill.submit("a", n=3)
    mill.worker.finish_all()
    seen = follow(client, job)
    assert sorted(made(seen)) == [0, 1, 2]
    assert seen[-1][2]["state"] == "succeeded"


def test_a_reader_goes_on_after_any_frame_and_misses_and_repeats_nothing(live: tuple) -> None:
    mill, client = live
    job = mill.submit("a", n=4)
    for lease in mill.worker.claim(4):
        mill.worker.finish(lease)
    whole = follow(client, job)
    for place in range(len(whole) - 1):
        assert follow(client, job, after=whole[place][0]) == whole[place + 1 :]


def test_a_reader_that_leaves_while_it_runs_goes_on(live: tuple) -> None:
    mill, client = live
    job = mill.submit("a", n=4)
    leases = mill.worker.claim(4)
    with client.stream("GET", job["urls"]["events"]) as answer:
        stream = frames(answer)
        mill.worker.finish(leases[0])
        seen = []
        while not made(seen):
            seen.append(next(stream))
    for lease in leases[1:]:
        mill.worker.finish(lease)
    seen += follow(client, job, after=seen[-1][0])
    assert sorted(made(seen)) == [0, 1, 2, 3]


def test_after_the_last_frame_there_is_nothing_to_come(live: tuple) -> None:
    mill, client = live
    job = mill.submit("a")
    mill.worker.finish_all()
    last = follow(client, job)[-1][0]
    answer = client.get(job["urls"]["events"], headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.content) == (204, b"")


def trim(server: EmbeddedServer, mill: Deployment, keep: int) -> None:
    """Have the queue forget all but the last events, as others' would make it."""
    with redis.Redis.from_url(server.url, protocol=2) as raw:
        raw.xtrim(Keys(mill.pool)("events"), maxlen=keep, approximate=False)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("has_seen", [0, -1, None])
def test_who_comes_back_for_what_is_gone_is_told_how_the_job_is(
    live: tuple, server: EmbeddedServer, has_seen: int | None, keep: int
) -> None:
    mill, client = live
    job = mill.submit("a", "b")
    mill.worker.finish_all()
    last = None if has_seen is None else follow(client, job)[has_seen][0]
    client.post(mill.submit("of somebody else")["urls"]["cancel"])
    trim(server, mill, keep)
    ((place, kind, data),) = follow(client, job, after=last)
    assert (kind, data["state"], data["counts"]["succeeded"]) == ("job", "succeeded", 2)
    answer = client.get(job["urls"]["events"], headers={"Last-Event-ID": place})
    assert answer.status_code == 204  # else a browser would come again for ever


def test_who_missed_images_of_a_running_job_begins_anew(
    live: tuple, server: EmbeddedServer
) -> None:
    mill, client = live
    job = mill.submit("a", n=3)
    first, second, third = mill.worker.claim(3)
    mill.worker.finish(first)
    with client.stream("GET", job["urls"]["events"]) as answer:
        seen = [next(frames(answer))]
    mill.worker.finish(second)
    trim(server, mill, keep=1)
    mill.worker.finish(third)
    seen = follow(client, job, after=seen[-1][0])
    assert [kind for _, kind, _ in seen] == ["job", "image", "image", "job"]
    assert seen[0][2]["counts"]["succeeded"] == 3
    assert made(seen) == [1, 2]


def test_a_deleted_job_ends_its_stream(live: tuple) -> None:
    mill, client = live
    job = mill.submit("a")
    with client.stream("GET", job["urls"]["events"]) as answer:
        stream = frames(answer)
        next(stream)
        client.delete(job["urls"]["self"])
        *_, last = stream
    assert last[1:] == ("deleted", {"id": job["id"]})


def test_a_job_that_goes_while_it_is_told_ends_its_stream(
    live: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    mill, client = live
    job = mill.submit("a")
    mill.worker.finish_all()

    def gone(*_: object) -> None:
        raise NotFound("no job")

    monkeypatch.setattr(mill.store, "image", gone)
    assert [kind for _, kind, _ in follow(client, job)] == ["job", "deleted"]


def test_heartbeats_keep_a_quiet_stream_alive(live: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    mill, client = live
    monkeypatch.setattr(job_stream, "HEARTBEAT_SECONDS", 0.05)
    job = mill.submit("a")
    with client.stream("GET", job["urls"]["events"]) as answer:
        kinds = [kind for _, kind, _ in islice(frames(answer), 4)]
    assert "comment" in kinds


def test_a_reader_that_goes_away_is_forgotten(live: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    mill, client = live
    monkeypatch.setattr(job_stream, "HEARTBEAT_SECONDS", 0.05)
    job = mill.submit("a")
    with client.stream("GET", job["urls"]["events"]) as answer:
        stream = frames(answer)
        next(stream)
        assert "imagemill_waits 1.0" in client.get("/metrics").text
    wait_until(lambda: "imagemill_waits 0.0" in client.get("/metrics").text)


def test_a_slow_reader_is_sent_off_and_can_go_on(
    live: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    mill, client = live
    monkeypatch.setattr(job_stream, "MAX_UNREAD", 0)
    job = mill.submit("a", n=2)
    seen: list[Frame] = []
    with client.stream("GET", job["urls"]["events"]) as answer:
        stream = frames(answer)
        seen.append(next(stream))
        mill.worker.finish_all()
        seen += stream
    monkeypatch.undo()
    seen += follow(client, job, after=seen[-1][0])
    assert sorted(made(seen)) == [0, 1]


@pytest.mark.parametrize("header", ["x", "1", "-1-0", "1-2-3", "9" * 30 + "-0"])
def test_a_last_event_id_that_is_none_is_400(live: tuple, header: str) -> None:
    mill, client = live
    job = mill.submit("a")
    answer = client.get(job["urls"]["events"], headers={"Last-Event-ID": header})
    assert answer.status_code == 400


def test_a_job_that_is_not_there_is_404(live: tuple) -> None:
    _, client = live
    assert client.get("/v1/jobs/nope/events").status_code == 404
