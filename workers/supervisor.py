"""Starts the workers of a catalog on this machine and keeps them alive.

One process a worker: one a device for each model, or the entry's `workers`. A worker that ends is
started again, after a pause that doubles while it keeps failing. SIGTERM passes on and waits; when
the supervisor itself is killed, its workers notice through their lifeline and drain.
Never imports torch: it counts devices from what the driver lists.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import structlog

from jobs import lifeline
from jobs.catalog import Catalog
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a restart: doubling from the first to the longest while a worker keeps failing."""

SETTLED_SECONDS = 60.0
"""A worker that lived this long failed for a new reason: the pause starts anew."""

GRACE_SECONDS = 10.0
"""How much longer than its own drain time a worker may take before it is killed."""


@dataclass(frozen=True, slots=True)
class Post:
    """A place for one worker: a model, the how-manieth of it, and its device."""

    model: str
    index: int
    device: str


@dataclass(slots=True)
class _Kept:
    post: Post
    process: subprocess.Popen[Any] | None = None
    started: float = 0.0
    pause: float = FIRST_PAUSE
    due: float = field(default_factory=time.monotonic)


def posts(
    catalog: Catalog, devices: list[str], *, only: str | None = None, count: int | None = None
) -> list[Post]:
    """The workers to start: `count` a model, else its `workers`, else one a device; dealt in turn.

    `only` names the one model to serve. Raises UnknownModel when the catalog has none such.
    """
    places = []
    turn = 0
    for model in catalog if only is None else [catalog.get(only)]:
        wanted = model.workers if count is None else count
        for index in range(len(devices) if wanted is None else wanted):
            device = model.devices[index % len(model.devices)] if model.devices else None
            places.append(Post(model.name, index, device or devices[turn % len(devices)]))
            turn += 1
    return places


def accelerators() -> list[str]:
    """Device names of this machine: `cuda:0`..., or `cpu` where no driver lists any."""
    lister = shutil.which("nvidia-smi")
    if lister is None:
        return ["cpu"]
    listed = subprocess.run([lister, "-L"], capture_output=True, text=True, check=False)
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = min(count, len([d for d in visible.split(",") if d.strip()]))
    return [f"cuda:{i}" for i in range(count)] or ["cpu"]


class Supervisor:
    """Keeps one process at every post until told to stop."""

    def __init__(self, places: list[Post], settings: WorkerSettings) -> None:
        self._kept = [_Kept(post) for post in places]
        self._settings = settings
        self._stop = threading.Event()

    def run(self) -> int:
        """Start, watch, restart; returns when stopped and every worker has ended."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        signal.signal(signal.SIGINT, lambda *_: self._stop.set())
        lifeline.watch(self._stop.set)
        while not self._stop.is_set():
            for kept in self._kept:
                self._tend(kept)
            self._stop.wait(0.1)
        self._end()
        return 0

    def _tend(self, kept: _Kept) -> None:
        now = time.monotonic()
        if kept.process is not None:
            code = kept.process.poll()
            if code is None:
                return
            lived = now - kept.started
            kept.pause = FIRST_PAUSE if lived > SETTLED_SECONDS else kept.pause
            kept.due, kept.process = now + kept.pause, None
            log.warning(
                "worker ended; starting another",
                model=kept.post.model,
                index=kept.post.index,
                code=code,
                lived=round(lived, 1),
                pause=kept.pause,
            )
            kept.pause = min(2 * kept.pause, LONGEST_PAUSE)
        if now >= kept.due:
            kept.process, kept.started = self._spawn(kept.post), now

    def _spawn(self, post: Post) -> subprocess.Popen[Any]:
        env = {**os.environ, "OMP_NUM_THREADS": str(self._settings.threads)}
        argv = [sys.executable, "-m", "workers", "--model", post.model]
        argv += ["--index", str(post.index), "--device", post.device]
        return lifeline.spawn(argv, env=env, stdin=subprocess.DEVNULL)

    def _end(self) -> None:
        """Ask every worker to drain, and kill those that do not."""
        running = [kept.process for kept in self._kept if kept.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + GRACE_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("worker does not drain; killing it", pid=process.pid)
                process.kill()
                process.wait()
