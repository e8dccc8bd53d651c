"""Turns finished latents into committed images, off the denoising thread.

An image is decoded, quantised and encoded with its recipe. The file is written and fsynced, and
only then committed with the fencing token, so an image can be downloaded only after its bytes are
safe. If the queue refuses a late commit, the file is removed. This thread also reports failures,
makes previews and gives images back, so the engine never waits for the queue or the disk. With a
phased pipeline, finished samples wait for the decoding phase.
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
from jobs.media import MEDIA_TYPES
from jobs.queue.store import Commit, Store
from jobs.recipe import Recipe
from jobs.reports import cut_warning
from jobs.runtime import tracing
from pipelines.seam import Pipeline, Sample
from workers import pictures
from workers.in_flight import InFlight, InFlightImages
from workers.phases import Phase, Phases

T = TypeVar("T")

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0
"""Pause before a failed write is retried."""

BACKOFF_SECONDS = 2.0
"""A failed image is retried after this times 2**attempt, with attempts counted from 1."""

BACKLOG = 16
"""Most finished samples to queue for decoding before the engine has to wait."""


class _Signal(Enum):
    """What else `run` can find in its queue."""

    GIVE_BACK = "an image was given back"
    DECODE = "the decoding phase is open"
    PREVIEW = "a preview was requested"
    CLOSE = "nothing more will be put"


class Delivery:
    """Delivers the images passed to `put` and reports those passed to `give_up`, in `run`."""

    def __init__(
        self,
        *,
        model: Model,
        store: Store,
        images: LocalImages,
        pipeline: Pipeline,
        flights: InFlightImages,
        phases: Phases,
    ) -> None:
        self.delivered = 0
        self.trouble: str | None = None
        self._model, self._store, self._images = model, store, images
        self._pipeline, self._flights, self._phases = pipeline, flights, phases
        self._queue: queue.Queue[tuple[InFlight, BaseException | None] | _Signal]
        self._queue = queue.Queue(BACKLOG)
        self._returned: queue.SimpleQueue[InFlight] = queue.SimpleQueue()
        self._previews: dict[str, tuple[InFlight, Sample]] = {}
        self._undecoded: list[InFlight] = []

    def put(self, flight: InFlight) -> None:
        """Deliver a finished sample; waits when the backlog is full."""
        self._queue.put((flight, None))

    def show(self, flight: InFlight, sample: Sample) -> None:
        """Make a preview of the sample; replaces one of the same image that's still waiting.

        Finished samples go first. Does nothing with a phased pipeline, because the decoder's
        weights may not be loaded.
        """
        if not self._phases.phased:
            self._previews[flight.lease.key] = flight, sample
            if self._queue.empty():  # otherwise `run` gets to it after those
                self._queue.put(_Signal.PREVIEW)

    def give_up(self, flight: InFlight, error: BaseException) -> None:
        """Report a failed image: final if it's an ImageFailed, otherwise it's retried."""
        self._queue.put((flight, error))

    def give_back(self, flight: InFlight) -> None:
        """Give an unstarted image back to the queue, ahead of what waits here."""
        self._returned.put(flight)
        if self._queue.empty():  # otherwise `run` checks before the next item
            self._queue.put(_Signal.GIVE_BACK)

    def decode_all(self) -> None:
        """Deliver what was put before, then end the decoding phase. Call it once that's open."""
        self._queue.put(_Signal.DECODE)

    def close(self) -> None:
        """Deliver what was put before, then end `run`."""
        self._queue.put(_Signal.CLOSE)

    def run(self) -> None:
        """Deliver until closed."""
        while (item := self._queue.get()) is not _Signal.CLOSE:
            self._release_returned()
            if item is _Signal.DECODE:
                self._deliver_undecoded()
                self._phases.end(Phase.DECODE)
            elif not isinstance(item, _Signal):
                self._handle(*item)
            while self._previews and self._queue.empty():
                first, *_ = self._previews
                self._preview(*self._previews.pop(first))
        self._release_returned()
        self._deliver_undecoded()

    def _handle(self, flight: InFlight, error: BaseException | None) -> None:
        if error is None and self._phases.phased:
            self._undecoded.append(flight)
        else:
            self._finish(flight, error)

    def _release_returned(self) -> None:
        while not self._returned.empty():
            flight = self._returned.get()
            self._until_stored(flight, partial(self._store.release, [flight.lease]))
            self._flights.remove(flight)

    def _deliver_undecoded(self) -> None:
        while self._undecoded:
            self._finish(self._undecoded.pop(0), None)
            self._release_returned()

    def _finish(self, flight: InFlight, error: BaseException | None) -> None:
        with structlog.contextvars.bound_contextvars(job=flight.lease.job_id):
            if flight.dropped:
                pass
            elif error is None:
                self._deliver(flight)
            else:
                self._report(flight, error)
        self._flights.remove(flight)

    def _preview(self, flight: InFlight, sample: Sample) -> None:
        """Write a preview of the sample; if that fails, the image isn't affected."""
        if flight.dropped or (flight.sample and flight.sample.done):
            return
        try:
            pixels = self._pipeline.preview(sample)
            if pixels is not None:
                data = pictures.thumbnail(pixels)
                self._images.write(flight.lease.job_id, flight.lease.index, "preview", data, ".jpg")
        except (torch.AcceleratorError, GroupLost):
            raise
        except Exception as error:
            log.info("no preview", image=flight.lease.key, reason=str(error))

    def _deliver(self, flight: InFlight) -> None:
        try:
            with tracing.under(flight.lease.trace, "decode", image=flight.lease.key):
                data = self._bytes(flight)
        except OutOfMemory as error:
            is_alone = len(self._flights) == 1  # otherwise others may hold the memory right now
            final = ImageFailed(f"decoding doesn't fit in the device's memory: {error}")
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
        uri = self._until_stored(
            flight,
            lambda: self._images.write(
                lease.job_id, lease.index, lease.token, data, f".{lease.request.format}"
            ),
        )
        if uri is not None:
            self._commit(flight, uri, data)

    def _warnings(self, flight: InFlight) -> tuple[str, ...]:
        """A warning for each of the image's texts that the model has cut."""
        assert flight.sample is not None
        limit = self._pipeline.card.max_prompt_tokens
        if limit is None:
            return ()
        return tuple(cut_warning(limit, text) for text in flight.sample.conditioning.cut)

    def _bytes(self, flight: InFlight) -> bytes:
        assert flight.sample is not None
        [pixels] = self._pipeline.decode([flight.sample])
        recipe = Recipe.of(
            flight.sample.request,
            self._model,
            scheduler=self._pipeline.card.scheduler,
            bucket=flight.bucket,
            tiled=bool(flight.sample.extra.get("tiled")),
            warnings=self._warnings(flight),
        )
        return pictures.encode(pixels, recipe)

    def _commit(self, flight: InFlight, uri: str, data: bytes) -> None:
        """Commit the image, or remove its file if the queue refuses the commit.

        Images that were dropped meanwhile are committed too. If the reply to a first try was lost,
        it may have taken effect, and then the file must stay. Only the queue knows that.
        """
        result = ImageResult(
            uri=uri,
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            media_type=MEDIA_TYPES[flight.lease.request.format],
            seconds=time.monotonic() - flight.claimed,
            warnings=self._warnings(flight),
        )
        with tracing.under(flight.lease.trace, "commit", image=flight.lease.key):
            outcome = self._until_stored(
                flight, lambda: self._store.commit([(flight.lease, result)])
            )
        if outcome == [Commit.STALE]:
            log.info("commit refused: lease lost or image cancelled", image=flight.lease.key)
            with suppress(OSError):  # it's removed with the job's other files later
                self._images.remove(uri)
        elif outcome is not None:
            self.delivered += 1
            log.info("image made", image=flight.lease.key, seconds=round(result.seconds, 3))

    def _report(self, flight: InFlight, error: BaseException) -> None:
        final = isinstance(error, ImageFailed)
        message = str(error) if final else f"{type(error).__name__}: {error}"
        log.warning("image failed", image=flight.lease.key, error=message, final=final)
        delay = 0.0 if final else BACKOFF_SECONDS * 2**flight.lease.attempt
        self._until_stored(
            flight,
            lambda: self._store.fail(flight.lease, message, again=not final, delay_seconds=delay),
        )

    def _until_stored(self, flight: InFlight, write: Callable[[], T]) -> T | None:
        """Retry `write` while storage is unavailable; None if the image was dropped meanwhile."""
        while True:
            try:
                result = write()
            except StorageUnavailable as error:
                self.trouble = str(error)
                log.warning("waiting for storage", image=flight.lease.key, reason=self.trouble)
                if flight.dropped:
                    return None
                time.sleep(RETRY_SECONDS)
            else:
                self.trouble = None
                return result
