"""Start services and workers for benchmarks, wait for them, end them, and remove their folders.

Each is its own process, as in a deployment, with an embedded queue server per benchmark. If a
process ends before it's ready, that's reported at once.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from imagemill.client.clients import Client
from imagemill.local.up_lock import running
from jobs.queue.store import Store
from jobs.reports import WorkerReport
from jobs.runtime import lifeline
from jobs.runtime.embedded_queue import EmbeddedServer

T = TypeVar("T")

LIMIT_SECONDS = 300.0
"""Time limit of every wait."""


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder, removed afterwards with everything in it."""
    with tempfile.TemporaryDirectory(prefix="imagemill-bench-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@contextmanager
def service(data: Path, models: Path, worked: str, **settings: str) -> Iterator[Client]:
    """A service with the catalog `models`, and a ready worker of its entry `worked`.

    `settings` are further `IMAGEMILL_*` variables, without the prefix.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    env = _variables(data, models, settings)
    with ExitStack() as stack:
        started = [
            stack.enter_context(_process(data, argv, env))
            for argv in (("service", "--port", str(port)), ("workers", "--model", worked))
        ]
        client = stack.enter_context(Client(f"http://127.0.0.1:{port}"))
        until(lambda: _is_ready(client.server), started)
        yield client


@contextmanager
def workers(data: Path, models: Path, worked: str, count: int = 1) -> Iterator[Store]:
    """`count` ready workers of the entry `worked`, and their queue, without a service."""
    with EmbeddedServer.ensure(data) as server, ExitStack() as stack:
        store = Store.connect(server.url)
        stack.callback(store.close)
        env = _variables(data, models, {"redis_url": server.url})
        argv = ("workers", "--model", worked, "--workers", str(count))
        started = stack.enter_context(_process(data, argv, env))
        until(lambda: _ready(store) == count, [started])
        yield store


@contextmanager
def up(data: Path, models: Path) -> Iterator[Client]:
    """What `imagemill up` starts for the catalog `models`, with its first worker ready."""
    argv = ("imagemill", "up", "--data", str(data), "--models", str(models), "--port", "0")
    with _process(data, argv, _variables(data, models, {})) as process:
        record = until(lambda: running(data), [process])
        with Client(record.url) as client:
            until(lambda: worker(client).ready, [process])
            yield client


def worker(client: Client) -> WorkerReport:
    """The only worker's latest report; an empty one before its first."""
    reports = client.get("/v1/workers")["data"]
    return WorkerReport.from_dict(reports[0]) if reports else WorkerReport()


def until(
    question: Callable[[], T | None],
    processes: Sequence[subprocess.Popen[Any]] = (),
    pause: float = 0.2,
) -> T:
    """Wait for a true answer. Raises TimeoutError, or RuntimeError if one of `processes` ends."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (answer := question()):
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a process of the benchmark ended before it was ready")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer in {LIMIT_SECONDS:g} seconds")
        time.sleep(pause)
    return answer


@contextmanager
def _process(
    data: Path, argv: Sequence[str], env: Mapping[str, str]
) -> Iterator[subprocess.Popen[Any]]:
    """Run `python -m argv` until the end of the block; its output is logged in the folder."""
    with (data / f"{argv[0]}.log").open("wb") as log:
        process = lifeline.spawn(
            [sys.executable, "-m", *argv], env=env, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _variables(data: Path, models: Path, settings: Mapping[str, str]) -> dict[str, str]:
    variables = {"data": str(data), "models": str(models), "threads": "1", **settings}
    return {**os.environ, **{f"IMAGEMILL_{name.upper()}": text for name, text in variables.items()}}


def _ready(store: Store) -> int:
    return sum(worker.report.ready for worker in store.workers())


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz").status_code == 200
    except httpx.HTTPError:
        return False
