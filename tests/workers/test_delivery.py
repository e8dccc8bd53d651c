"""What happens to files of images whose lease was lost, and what delivery does first."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.errors import StorageUnavailable
from jobs.job import ImageResult, Lease
from jobs.queue.store import Commit, Store
from jobs.recipe import recipe_of
from jobs.runtime.embedded_queue import EmbeddedServer
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from tests.workers.conftest import BATCHES_PAY, request
from tests.workers.line import Line
from workers.in_flight import InFlight


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line[FakePipeline]]:
    """A line without threads: tests deliver on their own thread."""
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        store = Store.connect(server.url)
        yield Line(tmp_path, store, FakePipeline(), BATCHES_PAY)
        store.close()


def claimed(line: Line[FakePipeline], count: int) -> list[InFlight]:
    """Submit and claim a job of this many images."""
    line.submit(*(request(seed=seed, steps=1) for seed in range(count)))
    leases = line.store.claim(
        "fake",
        "w",
        limit=count,
        lease_seconds=60,
        nonce=line.job_ids[-1],
        held=line.flights.keys(),
    )
    flights = [InFlight(lease) for lease in leases]
    for flight in flights:
        line.flights.add(flight)
    return flights


def finished(line: Line[FakePipeline], flight: InFlight) -> InFlight:
    """Encode and denoise an image."""
    request = flight.lease.request
    [flight.conditioning] = line.pipeline.encode([request])
    flight.sample = line.pipeline.start(request, flight.conditioning)
    line.pipeline.step([flight.sample])
    return flight


def deliver(line: Line[FakePipeline], *flights: InFlight) -> None:
    """Finish these images and deliver them all."""
    for flight in flights:
        line.delivery.put(finished(line, flight))
    line.delivery.close()
    line.delivery.run()


def files(folder: Path) -> list[Path]:
    """All files that delivery has written."""
    return [path for path in (folder / "images").rglob("*") if path.is_file()]


def cancel_between_write_and_commit(
    line: Line[FakePipeline], flight: InFlight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancel and drop the image after its file was written, as the heartbeat does."""
    write = line.images.write

    def write_and_cancel(job_id: str, index: int, token: str, data: bytes, suffix: str) -> str:
        uri = write(job_id, index, token, data, suffix)
        if token == flight.lease.token:
            line.store.cancel(job_id, None)
            flight.drop()
        return uri

    monkeypatch.setattr(line.images, "write", write_and_cancel)


def test_a_cut_prompt_is_a_warning_in_the_result_and_the_recipe(
    line: Line[FakePipeline], tmp_path: Path
) -> None:
    prompts = ("word " * 78, "word " * 77)
    line.submit(*(replace(request(steps=1), prompt=prompt) for prompt in prompts))
    leases = line.store.claim(
        "fake", "w", limit=2, lease_seconds=60, nonce="one", held=line.flights.keys()
    )
    flights = [InFlight(lease) for lease in leases]
    for flight in flights:
        line.flights.add(flight)
    deliver(line, *flights)
    long, fits = (image.result for image in line.store.images(line.job_ids[-1]))
    assert long and fits
    warning = "the model reads 77 tokens of a prompt and cuts the rest"
    assert (long.warnings, fits.warnings) == ((warning,), ())
    recipes = [recipe_of(line.images.path(result.uri)) or {} for result in (long, fits)]
    assert recipes[0]["warnings"] == [warning]
    assert "warnings" not in recipes[1]


def test_file_is_removed_if_cancelled_before_commit(
    line: Line[FakePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [flight] = claimed(line, 1)
    cancel_between_write_and_commit(line, flight, monkeypatch)
    deliver(line, flight)
    assert files(tmp_path) == []
    assert line.delivery.delivered == 0
    assert line.flights.all() == []


def test_undeletable_file_does_not_block_others(
    line: Line[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    [cancelled], [other] = claimed(line, 1), claimed(line, 1)
    cancel_between_write_and_commit(line, cancelled, monkeypatch)

    def refuse(uri: str) -> None:
        raise PermissionError(uri)

    monkeypatch.setattr(line.images, "remove", refuse)
    deliver(line, cancelled, other)
    assert line.job().counts.succeeded == 1


def test_file_stays_if_the_commit_reply_was_lost(
    line: Line[FakePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat reports a lost lease in this case, because the commit has ended it."""
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


def test_image_dropped_during_decoding_is_not_written(
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


def test_giving_back_does_not_wait_for_decoding(
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
