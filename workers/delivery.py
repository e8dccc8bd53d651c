"""From finished latents to a committed image, off the denoising thread.

Decode, quantise, encode with the recipe, write and fsync, then commit with the fencing token: an
image can be downloaded only after its bytes are safe. A commit that comes too late is refused by
the queue, and the file goes again. Failures are reported here too, previews made, and images given
back, so that the engine never waits for the queue or the disk. Where the pipeline's stages take
turns, finished samples are kept until the decoder's. Knows nothing of steps or batches.
"""

import hashlib
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TypeVar

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import GroupLost, ImageFailed, OutOfMemory, StorageUnavailable
from jobs.image_store import LocalImages
from jobs.job import ImageResult
from jobs.queue.store import Commit, Store
from jobs.runtime import tracing
from pipelines.seam import Pipeline, Sample
from workers import recipe
from workers.in_flight import Flight, Flights
from workers.phases import Phase, Phases

T = TypeVar("T")

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0
"""Pause before a store that refused a write is asked again."""

AGAIN_SECONDS = 2.0
"""A failed image is tried again after this times two to the power of its attempts."""

BACKLOG = 16
"""Finished samples that may wait for decoding before the engine waits for delivery."""


class _Word(Enum):
    """What `run` is told between flights."""

    GIVE_BACK = "something goes back to the queue"
    DECODE = "the decoding phase is open"
    PREVIEW = "a preview waits"
    CLOSE = "nothing more comes"


class Delivery:
    """Takes finished and failed flights from `put` and `give_up`, on one thread of its own."""

    def __init__(
        self,
        *,
        model: Model,
        store: Store,
        images: LocalImages,
        pipeline: Pipeline,
        flights: Flights,
        phases: Phases,
    ) -> None:
        self.delivered = 0
        self.trouble: str | None = None
        self._model, self._store, self._images = model, store, images
        self._pipeline, self._flights, self._phases = pipeline, flights, phases
        self._queue: queue.Queue[tuple[Flight, BaseException | None] | _Word]
        self._queue = queue.Queue(BACKLOG)
        self._returned: queue.SimpleQueue[Flight] = queue.SimpleQueue()
        self._previews: dict[str, tuple[Flight, Sample]] = {}
        self._kept: list[Flight] = []

    def put(self, flight: Flight) -> None:
        """Deliver a finished sample; waits when the backlog is full."""
        self._queue.put((flight, None))

    def show(self, flight: Flight, sample: Sample) -> None:
        """Make a preview of a sample as it stands, unless a newer one comes first.

        Finished ones go before. Left out while the decoder's weights may not be in their place.
        """
        if not self._phases.phased:
            self._previews[flight.lease.key] = flight, sample
            if self._queue.empty():  # otherwise its turn comes after what waits there
                self._queue.put(_Word.PREVIEW)

    def give_up(self, flight: Flight, error: BaseException) -> None:
        """Report a failed one: final when it is the image's own fault, tried again otherwise."""
        self._queue.put((flight, error))

    def give_back(self, flight: Flight) -> None:
        """Leave an image that has not begun to another worker: at once, before what waits here."""
        self._returned.put(flight)
        if self._queue.empty():  # otherwise `run` looks before it takes up what waits there
            self._queue.put(_Word.GIVE_BACK)

    def decode_all(self) -> None:
        """The decoding phase is open: deliver what was put before, then end the phase."""
        self._queue.put(_Word.DECODE)

    def close(self) -> None:
        """Deliver what was put before, then end `run`."""
        self._queue.put(_Word.CLOSE)

    def run(self) -> None:
        """Deliver until closed."""
        while (item := self._queue.get()) is not _Word.CLOSE:
            self._release_returned()
            if item is _Word.DECODE:
                self._deliver_kept()
                self._phases.end(Phase.DECODE)
            elif not isinstance(item, _Word):
                self._handle(*item)
            while self._previews and self._queue.empty():
                first, *_ = self._previews
                self._preview(*self._previews.pop(first))
        self._release_returned()
        self._deliver_kept()

    def _handle(self, flight: Flight, error: BaseException | None) -> None:
        if error is None and self._phases.phased:
            self._kept.append(flight)
        else:
            self._finish(flight, error)

    def _release_returned(self) -> None:
        while not self._returned.empty():
            flight = self._returned.get()
            self._insist(flight, partial(self._store.release, [flight.lease]))
            self._flights.remove(flight)

    def _deliver_kept(self) -> None:
        while self._kept:
            self._finish(self._kept.pop(0), None)
            self._release_returned()

    def _finish(self, flight: Flight, error: BaseException | None) -> None:
        with structlog.contextvars.bound_contextvars(job=flight.lease.job_id):
            if not flight.dropped:
                self._deliver(flight) if error is None else self._report(flight, error)
        self._flights.remove(flight)

    def _preview(self, flight: Flight, sample: Sample) -> None:
        """Write what the sample is about to become; a preview that fails is no failure."""
        if flight.dropped or (flight.sample and flight.sample.done):
            return
        try:
            pixels = self._pipeline.preview(sample)
            if pixels is not None:
                data = recipe.thumbnail(pixels)
                self._images.write(flight.lease.job_id, flight.lease.index, "preview", data, ".jpg")
        except (torch.AcceleratorError, GroupLost):
            raise
        except Exception as error:
            log.info("no preview", image=flight.lease.key, reason=str(error))

    def _deliver(self, flight: Flight) -> None:
        try:
            with tracing.under(flight.lease.trace, "decode", image=flight.lease.key):
                data = self._bytes(flight)
        except OutOfMemory as error:
            is_alone = len(self._flights) == 1  # the memory may be others' for the moment
            final = ImageFailed(f"decoding does not fit the device: {error}")
            self._report(flight, final if is_alone else error)
            return
        except (torch.AcceleratorError, GroupLost):
            raise
        except Exception as error:
            self._report(flight, error)
            return
        if flight.dropped:
            return
        lease = flight.lease
        uri = self._insist(
            flight,
            lambda: self._images.write(
                lease.job_id, lease.index, lease.token, data, f".{lease.request.format}"
            ),
        )
        if uri is not None:
            self._commit(flight, uri, data)

    def _bytes(self, flight: Flight) -> bytes:
        assert flight.sample is not None
        [pixels] = self._pipeline.decode([flight.sample])
        made = recipe.recipe(flight.sample, self._model, self._pipeline.card, flight.bucket)
        return recipe.encode(pixels, made)

    def _commit(self, flight: Flight, uri: str, data: bytes) -> None:
        """Finish the image, or remove its file where the queue says that it is not ours.

        A dropped flight asks too: only the queue knows whether a commit whose answer got lost has
        come to pass, and then the file must stay.
        """
        result = ImageResult(
            uri=uri,
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            media_type=recipe.MEDIA_TYPES[flight.lease.request.format],
            seconds=time.monotonic() - flight.claimed,
        )
        with tracing.under(flight.lease.trace, "commit", image=flight.lease.key):
            answer = self._insist(flight, lambda: self._store.commit([(flight.lease, result)]))
        if answer == [Commit.STALE]:
            log.info("commit refused: the image is not ours any more", image=flight.lease.key)
            with suppress(OSError):  # then it goes with its job's files
                self._images.remove(uri)
        elif answer is not None:
            self.delivered += 1
            log.info("image made", image=flight.lease.key, seconds=round(result.seconds, 3))

    def _report(self, flight: Flight, error: BaseException) -> None:
        final = isinstance(error, ImageFailed)
        message = str(error) if final else f"{type(error).__name__}: {error}"
        log.warning("image failed", image=flight.lease.key, error=message, final=final)
        delay = 0.0 if final else AGAIN_SECONDS * 2**flight.lease.attempt
        self._insist(
            flight,
            lambda: self._store.fail(flight.lease, message, again=not final, delay_seconds=delay),
        )

    def _insist(self, flight: Flight, write: Callable[[], T]) -> T | None:
        """Write, again while the store refuses it; None when the flight was dropped meanwhile."""
        while True:
            try:
                answer = write()
            except StorageUnavailable as error:
                self.trouble = str(error)
                log.warning("waiting for storage", image=flight.lease.key, reason=self.trouble)
                if flight.dropped:
                    return None
                time.sleep(RETRY_SECONDS)
            else:
                self.trouble = None
                return answer
