"""A real `imagemill` on its own data folder, started as a user would.

Every process of a data folder has it in its environment or its command line, so `processes_of`
finds exactly those, including orphans.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from imagemill.client.clients import Client
from imagemill.client.jobs import Job
from jobs.runtime.embedded_queue import EmbeddedServer
from tests import web
from tests.jobs.bench import expire_leases
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models.toml"
COMMAND = [sys.executable, "-m", "imagemill"]


def environment() -> dict[str, str]:
    """The environment without imagemill's settings, except for shorter drains; no colour."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("IMAGEMILL_")}
    return {**others, "IMAGEMILL_DRAIN_SECONDS": "5", "COLUMNS": "100", "NO_COLOR": "1"}


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with additional environment variables."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def start(*arguments: str | Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a command in its own process group, as a shell with job control does."""
    with output.open("wb") as file:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def start_up(data: Path, models: Path = MODELS) -> "Deployment":
    """`imagemill up` on a free port; its output goes to a file next to the folder."""
    output = data.with_name(f"{data.name}.txt")
    process = start("up", "--port", "0", "--data", data, "--models", models, output=output)
    return Deployment(data, process, output)


def processes_of(data: Path) -> dict[int, str]:
    """Every process that works on the data folder, including orphans: pid and command."""
    processes = {}
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = process.cmdline()
            belongs = process.environ().get("IMAGEMILL_DATA") == str(data)
        except psutil.Error:
            continue
        if belongs or any(str(data) in word for word in command):
            processes[process.pid] = " ".join(command)
    return processes


class Deployment:
    """A running `imagemill up`."""

    def __init__(self, data: Path, process: subprocess.Popen[bytes], output: Path) -> None:
        self.data, self.process = data, process
        self._output = output
        self.url = str(wait_until(self._record)["url"])

    def _record(self) -> Any:
        assert self.process.poll() is None, self.said()
        path = self.data / "up.json"
        return json.loads(path.read_text()) if path.exists() else None

    def said(self) -> str:
        """Everything that `up` has printed, on one line."""
        return " ".join(self._output.read_text().split())

    def pid_of(self, part: str) -> int | None:
        """The process id of a part: `service`, `workers` (the supervisor), `worker` or `queue`."""
        for pid, command in processes_of(self.data).items():
            is_worker = "-m workers --model" in command
            matches = {
                "service": "-m service" in command,
                "workers": "-m workers" in command and not is_worker,
                "worker": is_worker,
                "queue": "queue.sock" in command,
            }
            if matches[part]:
                return pid
        return None

    def kill(self, part: str) -> int:
        """SIGKILL a part and return its pid. A worker's leases are expired too."""
        pid = wait_until(lambda: self.pid_of(part))
        os.kill(pid, signal.SIGKILL)
        if part == "worker":
            wait_until(lambda: pid not in processes_of(self.data))
            self.expire_leases()
        return pid

    def expire_leases(self) -> None:
        """Expire the leases of dead workers now instead of waiting."""
        expire_leases(EmbeddedServer.ensure(self.data).url)

    def ready_workers(self) -> list[dict[str, Any]]:
        """The workers that report being ready."""
        with Client(self.url, patience=PATIENCE) as client:
            workers = client.get("/v1/workers")["data"]
        return [worker for worker in workers if worker["state"] == "ready"]

    def answers(self) -> bool:
        """Whether the service is up."""
        try:
            return web.get(f"{self.url}/healthz", timeout=PATIENCE).status_code == 200
        except httpx.HTTPError:
            return False


def midway(client: Client, model: str, prompt: str, n: int, **fields: Any) -> Job:
    """A job with some finished images, but not all; if it finishes too early, it's repeated."""
    while True:
        job = client.submit(model, prompt, n=n, **fields)
        counts = wait_until(lambda job=job: (now := job.refresh().counts).succeeded >= 3 and now)
        if counts.finished < n:
            return job


@contextmanager
def up(data: Path, models: Path = MODELS) -> Iterator[Deployment]:
    """`imagemill up` on a free port, stopped afterwards; fails if any process is left."""
    deployment = start_up(data, models)
    try:
        wait_until(deployment.answers)
        yield deployment
    finally:
        deployment.process.terminate()
        try:
            deployment.process.wait(PATIENCE)
        finally:
            deployment.process.kill()
            deployment.process.wait()
            left = processes_of(data)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
    assert left == {}
