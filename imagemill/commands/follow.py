"""Follows one job to its end: polls it, downloads each image as it finishes, reports progress.

Large jobs are polled without their images, which come from the event stream instead. Output goes to
a `View`. Progress counts the steps that the server measured, and rates and ETAs are computed from
it.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

from imagemill.client import protocol
from imagemill.client.clients import Client
from imagemill.client.errors import ApiError
from imagemill.client.jobs import fetch_file
from imagemill.client.stream import Stream
from imagemill.local.find_server import LONELY_SECONDS, NO_WORKER, why_not_ready
from imagemill.terminal.interrupts import Interrupted, Interrupts
from jobs.catalog import DERIVED
from jobs.errors import ImagemillError
from jobs.job import State

POLL_WAIT = 1.0
"""Seconds that the server may hold a poll; short, because Ctrl-C is noticed only between polls."""

RATE_WINDOW = 15.0
"""Seconds of recent progress from which the rate is computed."""

LARGE = 200
"""Images in a job above which the event stream is used, which sends each image only once."""

LARGEST_LOOK = 2000
LOOK_PER_IMAGE = 2e-3
"""The event stream doesn't include running images. If they're shown, jobs of up to LARGEST_LOOK
images are listed in full every LOOK_PER_IMAGE seconds per image, which is about 200 KB/s."""

PAUSE_PER_IMAGE = 2e-4
"""Extra seconds between polls per listed image; listing 10,000 of them takes half a second."""

CANCEL_PATIENCE = 5.0
"""Seconds to retry cancelling a job before the command ends without."""

LOOK_AT_WORKERS = 1.0
"""Seconds between two checks of the workers while no image is running."""


@dataclass(frozen=True, slots=True)
class Running:
    """A running image; `step` is measured."""

    index: int
    prompt: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class News:
    """The job's current progress.

    `saved` counts the images in the folder. `per_second` is in images per second and `eta` in
    seconds; both are None until progress has been made. `running` lists the running images that are
    known, `files` maps indexes to images in the folder.
    """

    total: int
    saved: int
    failed: int
    progress: float
    per_second: float | None
    eta: float | None
    note: str
    running: tuple[Running, ...] = ()
    files: Mapping[int, Path] = field(default_factory=dict)


class View(Protocol):
    """Displays progress."""

    def say(self, message: str) -> None:
        """Show a sentence permanently."""

    def update(self, news: News) -> None:
        """Show the job's current progress."""


class Rate:
    """Progress per second, measured over the last RATE_WINDOW seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, moment: float, progress: float) -> None:
        """Record the progress, 0..1, at a moment of the monotonic clock."""
        if self._seen and progress < self._seen[-1][1]:
            self._seen.clear()  # work was lost, so earlier measurements say nothing about the speed
        self._seen.append((moment, progress))
        while len(self._seen) > 2 and moment - self._seen[1][0] >= RATE_WINDOW:
            self._seen.popleft()

    def per_second(self) -> float | None:
        """The rate; None until two measurements differ."""
        if len(self._seen) < 2:
            return None
        # No progress at the start means the job was waiting for its turn, so the clock starts with
        # the last measurement before the first progress.
        first = next((a for a, b in pairwise(self._seen) if b[1] > a[1]), None)
        last = self._seen[-1]
        if first is None or last[0] <= first[0]:
            return None
        return (last[1] - first[1]) / (last[0] - first[0])


class Saved:
    """The files of a job's images in a folder, downloaded once each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(protocol.DOWNLOADS_AT_ONCE, thread_name_prefix="download")
        self.paths: dict[int, Path] = {}
        self.downloaded = 0

    def save(self, client: Client, job: dict[str, Any]) -> None:
        """Download newly finished images; raises the first failed download's error."""
        new = [
            image
            for image in job["images"]
            if image["state"] == State.SUCCEEDED and image["index"] not in self.paths
        ]
        results = self._pool.map(lambda image: fetch_file(client, job, image, self._folder), new)
        for image, (path, is_new) in zip(new, results, strict=True):
            self.paths[image["index"]] = path
            self.downloaded += is_new


class JobFeed:
    """A job's updates, from polls and, for large jobs, its event stream. A context manager."""

    def __init__(self, client: Client, job: dict[str, Any], shows_running: bool = False) -> None:
        """`shows_running`: whether to report the running images of large jobs too."""
        self._client, self._id, self._images = client, job["id"], job["images"]
        self._etag: str | None = None
        is_large = len(self._images) > LARGE and not State(job["state"]).finished
        self._stream = Stream(client, self._id) if is_large else None
        self._looks = shows_running and len(self._images) <= LARGEST_LOOK
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        if self._stream is not None:
            self._stream.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def news(self) -> dict[str, Any] | None:
        """The job with its images once it has changed; None if it hasn't within POLL_WAIT."""
        if self._stream is not None and self._stream.lost:
            # Without the stream, poll for images. The ETag is dropped so that the next poll returns
            # them immediately, including those that the stream missed.
            self._stream = self._etag = None
        wait = POLL_WAIT if self._etag else 0.0
        is_brief = self._is_brief()
        talk = protocol.poll(self._id, wait, self._etag, self._client.patience, brief=is_brief)
        job, self._etag = self._client.say(talk)
        if job is not None and not is_brief:
            self._images = job["images"]
        if self._stream is not None:
            for image in self._stream.take():
                self._images[image["index"]] = image
        if job is None or not is_brief:
            return job
        if State(job["state"]).finished:
            # The stream may lag behind the poll, so get the final images from the server.
            return self._client.get(protocol.job_path(self._id))
        return {**job, "images": self._images}

    def _is_brief(self) -> bool:
        """Whether the next poll leaves out the images."""
        now = time.monotonic()
        if self._stream is None:
            return False
        if not self._looks or now - self._looked < LOOK_PER_IMAGE * len(self._images):
            return True
        self._looked = now
        return False

    @property
    def pause(self) -> float:
        """Seconds to wait after an update before polling again."""
        count = 0 if self._stream is not None else len(self._images)
        return protocol.POLL_PAUSE + PAUSE_PER_IMAGE * count


class Hopeless(ImagemillError):
    """The job can't run because its model can't be loaded; the message says why."""


def wait_for_defaults(
    client: Client,
    model: str,
    fields: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    interrupts: Interrupts,
    give_up: bool,
    since: float,
) -> None:
    """Wait until a worker has read the model's own defaults for all that `fields` leaves out.

    Raises Interrupted and, with `give_up`, Hopeless as `follow` does.
    """
    reported = ""
    while not interrupts.asked():
        try:
            defaults = client.get(f"/v1/models/{model}")["defaults"]
        except ApiError:
            return  # submitting the job will fail with a better message
        needed = [name for name in DERIVED if name not in fields]
        if all(defaults.get(name) is not None for name in needed):
            return
        note, hopeless = why_not_ready(client, model, since)
        if hopeless and give_up:
            raise Hopeless(note)
        if note != reported:
            say(f"waiting for the defaults of {model}: {note}")
            reported = note
        interrupts.rest(LOOK_AT_WORKERS)
    raise Interrupted


def follow(
    client: Client,
    job: dict[str, Any],
    saved: Saved,
    view: View,
    *,
    interrupts: Interrupts,
    give_up: bool,
    since: float,
    advice: str,
    shows_running: bool = False,
) -> dict[str, Any]:
    """Follow a job until it has ended or the user interrupts; returns its last known state.

    Every image that succeeded by then is saved. With `give_up`, raises Hopeless once a worker has
    reported after `since` (seconds since the epoch) that it couldn't load the model. `advice` says
    where to look if no worker shows up. `shows_running`: whether the view shows running images.
    """
    with JobFeed(client, job, shows_running) as feed:
        return _follow(client, job, feed, saved, view, interrupts, give_up, since, advice)


def _follow(
    client: Client,
    job: dict[str, Any],
    feed: JobFeed,
    saved: Saved,
    view: View,
    interrupts: Interrupts,
    give_up: bool,
    since: float,
    advice: str,
) -> dict[str, Any]:
    rate, note = Rate(), ""
    # Check the workers in the first round already: a job that can't start should say so at once.
    looked, lonely_since = -LOOK_AT_WORKERS, time.monotonic()
    while True:
        # Save before looking at the state, so that nothing is missing when the loop returns.
        saved.save(client, job)
        now = time.monotonic()
        rate.add(now, job["progress"])
        # An interrupt ends the loop without cancelling: the caller cancels and reports.
        if State(job["state"]).finished or interrupts.asked():
            view.update(_news(job, saved, rate, ""))
            return job
        if job["counts"]["running"]:
            note = ""
        # Nothing is running, so find out why. That costs a request, hence at most one per second.
        elif now - looked >= LOOK_AT_WORKERS:
            note, hopeless = why_not_ready(client, job["model"], since)
            looked = now
            # A killed worker is normally back within seconds, so the user is told only after half a
            # minute without any worker, and then once per half minute.
            lonely_since = lonely_since if note == NO_WORKER else now
            if now - lonely_since > LONELY_SECONDS:
                view.say(f"no worker has reported for {LONELY_SECONDS:g} s; {advice}")
                lonely_since = now
            # A private server exists only for this command, so there's nothing to wait for. On a
            # shared one the job stays queued, because its operator may fix the model.
            if hopeless and give_up:
                raise Hopeless(note)
        view.update(_news(job, saved, rate, note))
        latest = feed.news()
        if latest is not None:
            job = latest
            # Without this pause, a job that changes constantly would be polled constantly. If
            # nothing changed, the poll itself has already waited on the server.
            interrupts.rest(feed.pause)


def _news(job: dict[str, Any], saved: Saved, rate: Rate, note: str) -> News:
    counts, speed = job["counts"], rate.per_second()
    left = 1.0 - job["progress"]
    return News(
        total=counts["total"],
        saved=len(saved.paths),
        failed=counts["failed"],
        progress=job["progress"],
        per_second=None if speed is None else speed * counts["total"],
        eta=None if not speed else left / speed,
        note=note or ("" if counts["running"] else str(job["state"])),
        running=tuple(
            Running(image["index"], image["prompt"], image["step"], image["steps"])
            for image in job["images"]
            if image["state"] == State.RUNNING
        ),
        files=dict(saved.paths),
    )
