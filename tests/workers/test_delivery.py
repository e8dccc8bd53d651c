"""What becomes of an image's file when the image is not ours any more, and what goes first."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from jobs.errors import StorageUnavailable
from jobs.job import ImageResult, Lease
from jobs.queue.store import Commit, Store
from jobs.runtime.embedded_queue import EmbeddedServer
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from tests.workers.conftest import BATCHES_PAY, request
from tests.workers.line import Line
from workers.in_flight import Flight


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line[FakePipeline]]:
    """Its threads do not run: what a test puts is delivered on its own thread."""
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        store = Store.connect(server.url)
        yield Line(tmp_path, store, FakePipeline(), BATCHES_PAY)
        store.close()


def claimed(line: Line[FakePipeline], count: int) -> list[Flight]:
    """Flights of a new job with so many images."""
    line.submit(*(request(seed=seed, steps=1) for seed in range(count)))
    leases = line.store.claim(
        "fake",
        "w",
        limit=count,
        lease_seconds=60,
        nonce=line.job_ids[-1],
        held=line.flights.keys(),
    )
    flights = [Flight(lease) for lease in leases]
    for flight in flights:
        line.flights.add(flight)
    return flights


def finished(line: Line[FakePipeline], flight: Flight) -> Flight:
    """Encoded and denoised."""
    wanted = flight.lease.request
    [flight.conditioning] = line.pipeline.encode([wanted])
    flight.sample = line.pipeline.start(wanted, flight.conditioning)
    line.pipeline.step([flight.sample])
    return flight


def deliver(line: Line[FakePipeline], *flights: Flight) -> None:
    """Until all of them are out."""
    for flight in flights:
        line.delivery.put(finished(line, flight))
    line.delivery.close()
    line.delivery.run()


def files(folder: Path) -> list[Path]:
    """All that delivery has written."""
    return [path for path in (folder / "images").rglob("*") if path.is_file()]


def cancel_between_write_and_commit(
    line: Line[FakePipeline], flight: Flight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the heartbeat learns of it, after the file was written."""
    write = line.images.write

    def write_and_cancel(job_id: str, index: int, token: str, data: bytes, suffix: str) -> str:
        uri = write(job_id, index, token, data, suffix)
        if token == flight.lease.token:
            line.store.cancel(job_id, None)
            flight.drop()
        return uri

    monkeypatch.setattr(line.images, "write", write_and_cancel)


def test_the_file_of_an_image_cancelled_before_its_commit_goes(
    line: Line[FakePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [flight] = claimed(line, 1)
    cancel_between_write_and_commit(line, flight, monkeypatch)
    deliver(line, flight)
    assert files(tmp_path) == []
    assert line.delivery.delivered == 0
    assert line.flights.all() == []


def test_a_file_that_cannot_be_removed_holds_up_nobody(
    line: Line[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    [gone], [kept] = claimed(line, 1), claimed(line, 1)
    cancel_between_write_and_commit(line, gone, monkeypatch)

    def refuse(uri: str) -> None:
        raise PermissionError(uri)

    monkeypatch.setattr(line.images, "remove", refuse)
    deliver(line, gone, kept)
    assert line.job().counts.succeeded == 1


def test_the_file_of_a_commit_whose_answer_got_lost_stays(
    line: Line[FakePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the beat says that the lease is gone: it is, for the commit came to pass."""
    [flight] = claimed(line, 1)
    commit = line.store.commit

    def commit_and_drop(done: Sequence[tuple[Lease, ImageResult]]) -> list[Commit]:
        commit(done)
        flight.drop()
        raise StorageUnavailable("the answer got lost")

    monkeypatch.setattr(line.store, "commit", commit_and_drop)
    deliver(line, flight)
    assert line.job().counts.succeeded == 1
    assert len(files(tmp_path)) == 1


def test_what_is_dropped_while_it_is_decoded_is_not_written(
    line: Line[FakePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [flight] = claimed(line, 1)
    decode = line.pipeline.decode

    def decode_and_drop(samples: Sequence[Sample]) -> list[torch.Tensor]:
        flight.drop()
        return decode(samples)

    monkeypatch.setattr(line.pipeline, "decode", decode_and_drop)
    deliver(line, flight)
    assert not (tmp_path / "images" / flight.lease.job_id).exists()


def test_what_is_given_back_does_not_wait_for_what_is_to_be_decoded(
    line: Line[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, unbegun = claimed(line, 3)
    decode, queued = line.pipeline.decode, list[int]()

    def decode_and_look(samples: Sequence[Sample]) -> list[torch.Tensor]:
        queued.append(line.job().counts.queued)
        return decode(samples)

    monkeypatch.setattr(line.pipeline, "decode", decode_and_look)
    line.delivery.put(finished(line, first))
    line.delivery.put(finished(line, second))
    line.delivery.give_back(unbegun)
    deliver(line)
    assert queued == [1, 1]
    assert line.flights.all() == []
