"""Follows one job to its end: polls it, downloads each image as it finishes, reports progress.

A large job is polled without its images, which come from its event stream instead. Knows no
terminal: what there is to show goes to a `View`. Progress is the server's measured steps,
and every rate and ETA is computed from those.
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
from imagemill.client.jobs import bring
from imagemill.client.stream import Stream
from imagemill.local.find_server import NO_WORKER, why_not_ready
from imagemill.terminal.interrupts import Interrupted, Interrupts
from jobs.catalog import DERIVED
from jobs.errors import ImagemillError
from jobs.job import State

POLL_WAIT = 1.0
"""Seconds that a poll may wait on the server; it also bounds how late Ctrl-C is noticed."""

RATE_WINDOW = 15.0
"""Seconds of past progress that the rate is measured over."""

LARGE = 200
"""A job of more images is told by its event stream, once an image and not once a poll."""

LARGEST_LOOK = 2000
LOOK_PER_IMAGE = 2e-3
"""Where running images are to be shown, a large job up to LARGEST_LOOK is listed now and then after
all: so many seconds for each of its images apart, which is about 200 KB a second."""

PAUSE_PER_IMAGE = 2e-4
"""More seconds between polls for each image that they list: 10,000 of them take half a second."""

LONELY_SECONDS = 30.0
"""Seconds without any worker after which the user is told where to look."""

LOOK_AT_WORKERS = 1.0
"""Seconds between two looks at the workers while nothing moves."""


@dataclass(frozen=True, slots=True)
class Running:
    """An image in work; `step` of `steps` is measured."""

    index: int
    prompt: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class News:
    """How the job is now; rates are None until two measurements differ.

    `saved` counts images in the folder, `per_second` is images a second, `eta` seconds. `running`
    are the images in work, as far as is known; `files` are the pictures in the folder by index.
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
    """Where progress is shown."""

    def say(self, message: str) -> None:
        """Show a sentence that stays."""

    def update(self, news: News) -> None:
        """Show how the job is now."""


class Rate:
    """Progress per second over the last RATE_WINDOW seconds, from measurements alone."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, moment: float, progress: float) -> None:
        """A measurement: progress 0..1 at a moment of the monotonic clock."""
        if self._seen and progress < self._seen[-1][1]:
            self._seen.clear()  # lost work: what was measured before no longer tells the speed
        self._seen.append((moment, progress))
        while len(self._seen) > 2 and moment - self._seen[1][0] >= RATE_WINDOW:
            self._seen.popleft()

    def per_second(self) -> float | None:
        """None until there are two measurements that differ."""
        if len(self._seen) < 2:
            return None
        # Standing still at the start is waiting for a turn, not working slowly.
        first = next((s for s, then in pairwise(self._seen) if then[1] > s[1]), None)
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
        """Bring what has finished since; raises what the first failing download raises."""
        new = [
            image
            for image in job["images"]
            if image["state"] == State.SUCCEEDED and image["index"] not in self.paths
        ]
        brought = self._pool.map(lambda image: bring(client, job, image, self._folder), new)
        for image, (path, is_new) in zip(new, brought, strict=True):
            self.paths[image["index"]] = path
            self.downloaded += is_new


class Telling:
    """What the server tells of a job, poll by poll; use as a context manager."""

    def __init__(self, client: Client, job: dict[str, Any], shows_running: bool = False) -> None:
        """`shows_running`: whether the running images of a large job are wanted too."""
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
        """The job with its images, as soon as it differs from before; None if it does not soon."""
        if self._stream is not None and self._stream.lost:
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
            return self._client.get(protocol.job_path(self._id))
        return {**job, "images": self._images}

    def _is_brief(self) -> bool:
        """Whether the next poll does without images."""
        now = time.monotonic()
        if self._stream is None:
            return False
        if not self._looks or now - self._looked < LOOK_PER_IMAGE * len(self._images):
            return True
        self._looked = now
        return False

    @property
    def pause(self) -> float:
        """Seconds to leave the server alone after it has told something."""
        listed = 0 if self._stream is not None else len(self._images)
        return protocol.POLL_PAUSE + PAUSE_PER_IMAGE * listed


class Hopeless(ImagemillError):
    """The job cannot go on: its model cannot be loaded; the message says why."""


def wait_for_defaults(
    client: Client,
    model: str,
    given: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    interrupts: Interrupts,
    give_up: bool,
    since: float,
) -> None:
    """Wait until a worker has read the model's own defaults, for all that isn't `given`.

    Raises Interrupted; with `give_up`, Hopeless as `follow` does.
    """
    told = ""
    while not interrupts.asked():
        try:
            defaults = client.get(f"/v1/models/{model}")["defaults"]
        except ApiError:
            return  # the job's own refusal says more
        needed = [name for name in DERIVED if name not in given]
        if all(defaults.get(name) is not None for name in needed):
            return
        note, hopeless = why_not_ready(client, model, since)
        if hopeless and give_up:
            raise Hopeless(note)
        if note != told:
            say(f"the defaults of {model} aren't known yet: {note}")
            told = note
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
    """The job at its end, every image that succeeded saved; or as it is when interrupted.

    With `give_up`, raises Hopeless once a worker says after `since` (seconds since the epoch) that
    it could not load the model. `advice` says where to look when no worker shows up.
    `shows_running`: whether the view shows running images.
    """
    with Telling(client, job, shows_running) as telling:
        return _follow(client, job, telling, saved, view, interrupts, give_up, since, advice)


def _follow(
    client: Client,
    job: dict[str, Any],
    telling: Telling,
    saved: Saved,
    view: View,
    interrupts: Interrupts,
    give_up: bool,
    since: float,
    advice: str,
) -> dict[str, Any]:
    rate, note = Rate(), ""
    looked, lonely_since = -LOOK_AT_WORKERS, time.monotonic()
    while True:
        saved.save(client, job)
        now = time.monotonic()
        rate.add(now, job["progress"])
        if State(job["state"]).finished or interrupts.asked():
            view.update(_news(job, saved, rate, ""))
            return job
        if job["counts"]["running"]:
            note = ""
        elif now - looked >= LOOK_AT_WORKERS:
            note, hopeless = why_not_ready(client, job["model"], since)
            looked = now
            lonely_since = lonely_since if note == NO_WORKER else now
            if now - lonely_since > LONELY_SECONDS:
                view.say(f"no worker has reported for {LONELY_SECONDS:g} s; {advice}")
                lonely_since = now
            if hopeless and give_up:
                raise Hopeless(note)
        view.update(_news(job, saved, rate, note))
        latest = telling.news()
        if latest is not None:
            job = latest
            interrupts.rest(telling.pause)


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
