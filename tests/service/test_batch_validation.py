"""A batch is answered before its lines are checked: keys, restarts and cancels meanwhile."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from jobs.runtime.embedded_queue import EmbeddedServer
from service.openai import batches
from tests.service.conftest import Deployment
from tests.service.live import batch_service
from tests.service.test_openai_batches import begin, ended, line, upload, validated
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def live(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, openai.OpenAI]]:
    """A service that listens on a port, and OpenAI's client for it."""
    with batch_service(server, tmp_path_factory.mktemp("batches")) as parts:
        yield parts


def test_repeated_post_with_a_key_makes_one_batch(live: tuple) -> None:
    deployment, client = live
    before = len(list(client.batches.list()))
    sent = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    sent["input_file_id"] = upload(client, line("once"))
    key = {"Idempotency-Key": "batch-1"}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.batches.create, **sent, extra_headers=key) for _ in range(4)]
        ids = {call.result(PATIENCE).id for call in calls}
    assert len(ids) == 1 and len(list(client.batches.list())) == before + 1
    batch = validated(client, ids.pop())
    assert len(batch.jobs) == 1
    deployment.worker.finish_all()
    assert ended(client, batch).id == client.batches.create(**sent, extra_headers=key).id
    with pytest.raises(openai.BadRequestError, match="different body"):
        client.batches.create(**sent, metadata={"k": "other"}, extra_headers=key)
    with pytest.raises(openai.BadRequestError, match="visible ASCII"):
        client.batches.create(**sent, extra_headers={"Idempotency-Key": "a b"})


def test_a_check_that_a_process_left_is_done_once_by_the_next(
    live: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, client = live
    monkeypatch.setattr(batches, "start_validation", lambda *_: None)
    sent = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    batch = client.batches.create(**sent, input_file_id=upload(client, line("left")))
    assert client.batches.retrieve(batch.id).status == "validating"
    monkeypatch.undo()
    monkeypatch.setattr(batches, "ABANDONED_SECONDS", -1)
    assert len(validated(client, batch.id).jobs) == 1
    deployment.worker.finish_all()
    assert ended(client, batch).request_counts.completed == 1


def test_batch_cancelled_while_it_is_checked_queues_nothing(
    live: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment, client = live
    before = deployment.store.queue_depth()
    monkeypatch.setattr(batches, "start_validation", lambda *_: None)
    sent = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    batch = client.batches.create(**sent, input_file_id=upload(client, line("unwanted")))
    assert client.batches.cancel(batch.id).status == "cancelling"
    monkeypatch.undo()
    monkeypatch.setattr(batches, "ABANDONED_SECONDS", -1)
    assert ended(client, batch).status == "cancelled"
    assert deployment.store.queue_depth() == before


def test_batch_over_quota_queues_nothing(live: tuple) -> None:
    deployment, client = live
    before = deployment.store.queue_depth()
    lines = [line(str(number), n=10) for number in range(16)]
    batch = begin(client, *lines)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "quota_exceeded")
    assert deployment.store.queue_depth() == before
