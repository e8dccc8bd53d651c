"""How often a waiting request reads its job, and the hub's memory of ended jobs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.queue.decode import Event
from service.read import long_poll
from service.read.events import RECENT_ENDS, EventHub, Watch
from tests.service.conftest import Deployment
from tests.waiting import wait_until

WISH = {"prompt": "a", "size": "32x32"}


def _event(job: str, kind: str, number: int = 1) -> Event:
    return Event(f"{number}-0", job, kind, None, {})


def test_request_reads_its_job_once_despite_progress(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    read = deployment.store.job_and_images

    def counting(job_id: str, tenant: str | None) -> object:
        looks.append(job_id)
        return read(job_id, tenant)

    monkeypatch.setattr(deployment.store, "job_and_images", counting)
    monkeypatch.setattr(long_poll, "RECHECK_SECONDS", 1000)
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(deployment.client.post, "/v1/images/generations", json=WISH)
        (lease,) = wait_until(deployment.worker.claim)
        for step in range(1, 9):
            deployment.store.beat("hand", {(lease.key, lease.token): step}, 60)
        deployment.worker.finish(lease)
        assert response.result().status_code == 200
    assert looks == [lease.job_id]


@pytest.mark.parametrize("kind", ["succeeded", "failed", "cancelled", "deleted"])
def test_watch_is_woken_by_an_earlier_end(kind: str) -> None:
    async def wakes(job: str) -> bool:
        with hub.watch(job, ends_only=True) as watch:
            return await watch.news_within(0.01)

    hub = EventHub(None)  # type: ignore[arg-type]
    hub._remember_ends([_event("over", kind), _event("under way", "progress")])
    assert asyncio.run(wakes("over"))
    assert not asyncio.run(wakes("under way"))


def test_ends_only_watch_ignores_progress() -> None:
    async def woken(kind: str) -> tuple[bool, bool]:
        with hub.watch("job") as every, hub.watch("job", ends_only=True) as end:
            hub._deliver([_event("job", kind)])
            return await every.news_within(0.01), await end.news_within(0.01)

    hub = EventHub(None)  # type: ignore[arg-type]
    assert asyncio.run(woken("progress")) == (True, False)
    assert asyncio.run(woken("image")) == (True, False)
    assert asyncio.run(woken("failed")) == (True, True)


def test_hub_forgets_the_oldest_ends() -> None:
    hub = EventHub(None)  # type: ignore[arg-type]
    hub._remember_ends([_event(str(number), "succeeded") for number in range(RECENT_ENDS + 1)])
    assert len(hub._ended) == RECENT_ENDS
    assert "0" not in hub._ended


def test_disconnect_wakes_the_watch() -> None:
    async def leave() -> tuple[bool, bool, bool]:
        left = asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        watch = Watch(0, ends_only=True)
        with long_poll._departure(receive, watch) as has_left:
            before = has_left()
            left.set()
            return before, await watch.news_within(60), has_left()

    assert asyncio.run(leave()) == (False, True, True)
