"""Groups of ranks started by torchrun or accelerate, with a tiny real model.

`Line` is a queue server, a store and a data folder without `up`, so the launcher's processes are
the only others.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from jobs.job import Job
from jobs.queue.store import Store
from jobs.request import ImageRequest
from jobs.runtime import lifeline
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.end_to_end.deployment import ROOT, environment, processes_of
from tests.jobs.bench import expire_leases
from tests.waiting import PATIENCE, wait_until

SIDE, STEPS = 64, 12

_GROUP = 'placement = "context_parallel"\nulysses = 2\n'
ENTRIES = {
    "plain": "max_sequence_length = 16",
    "ulysses": f"{_GROUP}max_sequence_length = 16",
    "pipelined": 'placement = "pipelined"\nstages = 2\nchunks = 2\nmax_sequence_length = 16',
    "phased": 'placement = "split"\nunload = true\nmax_sequence_length = 16',
    "short": f"{_GROUP}max_sequence_length = 1",
}
"""Catalog entries of one tiny Flux; the last leaves a rank without prompt tokens."""


def catalog(folder: Path, weights: Path, *names: str) -> Path:
    """Write a `models.toml` with these entries to the folder."""
    path = folder / "models.toml"
    common = (
        f'path = "{weights}"\ndtype = "float32"\n'
        f"defaults = {{ width = {SIDE}, height = {SIDE}, steps = {STEPS}, guidance_scale = 1.0 }}\n"
    )
    path.write_text("".join(f"[models.{name}]\n{ENTRIES[name]}\n{common}\n" for name in names))
    return path


def ranks(data: Path) -> dict[int, int]:
    """The processes of the group that works on the data folder: rank and pid."""
    pids = {}
    for pid, command in processes_of(data).items():
        try:
            rank = psutil.Process(pid).environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None and "-m workers" in command:
            pids[int(rank)] = pid
    return pids


class Line:
    """A queue for one model, and the launcher that serves it."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.data = folder / "data"
        self._server = EmbeddedServer.ensure(self.data)
        self.store = Store.connect(self._server.url)
        self._env = {
            **environment(),
            "IMAGEMILL_DATA": str(self.data),
            "IMAGEMILL_MODELS": str(models),
            "PYTHONPATH": str(ROOT),
        }
        self.output = folder / "output.txt"
        self.process: subprocess.Popen[Any] | None = None

    def start(self, *command: str) -> None:
        """Start a launcher or the supervisor, as a shell with job control does."""
        with self.output.open("wb") as file:
            self.process = lifeline.spawn(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def submit(self, model: str, count: int) -> str:
        """Submit a job with `count` images; returns its id."""
        requests = [
            ImageRequest(model, f"a fish, {i}", i, SIDE, SIDE, STEPS, 1.0) for i in range(count)
        ]
        submitted = self.store.submit(
            requests,
            tenant="local",
            priority=5,
            metadata={},
            spec={},
            quota=1000,
            keep_seconds=3600,
            max_attempts=1,
        )
        return submitted.job_id

    def finish(self, job_id: str) -> Job:
        """Wait for the job's end."""
        assert self.process is not None

        def over() -> Job | None:
            assert self.process is None or self.process.poll() is None, self.said()
            job = self.store.job(job_id, None)
            return job if job.state.finished else None

        return wait_until(over)

    def expire_leases(self) -> None:
        """Expire the leases of dead workers now instead of waiting."""
        expire_leases(self._server.url)

    def said(self) -> str:
        """Everything that the processes have printed."""
        return self.output.read_text()

    def end(self, number: signal.Signals, *, whole_group: bool = False) -> int:
        """Signal the launcher, or its whole group as Ctrl-C does; returns its exit code."""
        assert self.process is not None
        (os.killpg if whole_group else os.kill)(self.process.pid, number)
        return self.process.wait(PATIENCE)

    def left(self) -> dict[int, str]:
        """Processes that still work on the folder, except the queue server."""
        return {p: c for p, c in processes_of(self.data).items() if "queue.sock" not in c}

    def close(self) -> None:
        """Kill the remaining processes, and stop the queue."""
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        self.store.close()
        self._server.stop()


@contextmanager
def line(folder: Path, models: Path) -> Iterator[Line]:
    """A `Line`, closed afterwards; fails if any process is left."""
    queue = Line(folder, models)
    try:
        yield queue
        wait_until(lambda: queue.left() == {})
    finally:
        queue.close()
