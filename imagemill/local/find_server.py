"""Finds the server that a command talks to, or starts a private one for as long as it is needed.

Order: the address that was given (or IMAGEMILL_SERVER), then the `up` that runs on the data
folder, then, for `generate` only, a private `up` of its own. Knows the locks of `running.py` and
nothing of jobs.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagemill.client.clients import Client
from imagemill.client.errors import ApiError, NoServer, ServerUnreachable, StartFailed
from imagemill.local.children import environment, last_line, module, open_log
from imagemill.local.up_lock import Record, Users, is_held, is_used, running
from imagemill.terminal.interrupts import Interrupts
from jobs.catalog import load_catalog
from jobs.errors import ImagemillError

NO_WORKER, WAITING = "waiting for a worker", "waiting for the server"
LOOK_PAUSE = 0.1
FIRST_PATIENCE = 2.0
"""Seconds of retries at the first contact with a named server, which may just be a wrong name."""

LOCAL_PATIENCE = 600.0
"""Seconds of retries at a local server whose `up` lives and starts what has died again."""

START_LIMIT = 1800.0
"""Seconds for an `up` that lives to answer; models may go on loading after that."""

ENDING_LIMIT = 600.0
"""Seconds to wait for a private `up` that is ending."""

NEWS_PAUSE = 30.0
"""Seconds between two sentences about what a command still waits for."""

SHARED_LOOKS = 3
"""Looks in a row that must find another user before a private `up` is left to it."""


def given_server(server: str | None, data: Path) -> str:
    """The address for commands that start nothing; raises NoServer when there is none."""
    named = server or os.environ.get("IMAGEMILL_SERVER")
    if named:
        return named
    record = running(data)
    if record is None:
        raise NoServer(
            f"nothing runs on the data folder {data}; start `imagemill up`, or name a server "
            "with --server or IMAGEMILL_SERVER"
        )
    return record.url


@contextmanager
def server_for(
    server: str | None,
    data: Path,
    models: Path,
    say: Callable[[str], None],
    note: Callable[[str], None],
    interrupts: Interrupts,
) -> Iterator[tuple[Client, bool]]:
    """A client of the named server, or of a local one kept running meanwhile.

    The second value tells whether the server is a private one. `say` gets what happened and
    `note` what the client waits for. Raises Interrupted when the user stops the wait.
    """

    def pause(seconds: float) -> None:
        note(WAITING)
        interrupts.pause(seconds)

    named = server or os.environ.get("IMAGEMILL_SERVER")
    if named:
        with Client(named, patience=FIRST_PATIENCE, pause=interrupts.pause) as first:
            first.get("/healthz")
        with Client(named, pause=pause) as client:
            yield client, False
        return

    with _local(data, models, say, interrupts) as record:

        def pause_while_it_runs(seconds: float) -> None:
            if running(data) is None:
                raise ServerUnreachable(record.url, f"the `up` on {data} has ended")
            pause(seconds)

        patience = LOCAL_PATIENCE
        with Client(record.url, patience=patience, pause=pause_while_it_runs) as client:
            yield client, record.private


@contextmanager
def _local(
    data: Path, models: Path, say: Callable[[str], None], interrupts: Interrupts
) -> Iterator[Record]:
    """The `up` of the folder, adopted or started; a private one is seen off at the end."""
    users, started = Users(data), None
    record: Record | None = None
    try:
        ending = f"an `up` on {data} has not ended yet"
        _until(users.join, ENDING_LIMIT, ending, say, interrupts)
        record = running(data)
        if record is None:
            say(f"starting imagemill on {data}")
            started = _start(data, models)
            record = _announced(data, started, say, interrupts)
        else:
            say(f"using imagemill at {record.url}")
        _wait_until_it_answers(record, data, say, interrupts)
        yield record
    finally:
        users.leave()
        is_private = started is not None or (record is not None and record.private)
        if is_private and not isinstance(sys.exception(), KeyboardInterrupt):
            _wait_until_gone(data, started)


def _start(data: Path, models: Path) -> subprocess.Popen[bytes]:
    """Start `up --private`, which ends by itself once nobody holds the users' lock."""
    load_catalog(models)  # a mistake in it is said here, not in a log
    where = ["--host", "127.0.0.1", "--port", "0", "--data", str(data), "--models", str(models)]
    with open_log(data / "up.log") as output:
        return subprocess.Popen(
            module("imagemill", "up", "--private", *where),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _announced(
    data: Path,
    process: subprocess.Popen[bytes],
    say: Callable[[str], None],
    interrupts: Interrupts,
) -> Record:
    """The address, once told: by the process that was started, or by one that was faster."""
    found: list[Record] = []

    def is_known() -> bool:
        has_ended = process.poll() is not None
        record = running(data)
        if record is not None:
            found.append(record)
        elif has_ended and not is_held(data / "up.lock"):
            raise StartFailed(f"imagemill did not start: {last_line(data / 'up.log')}")
        return record is not None

    starting = f"imagemill has not started yet; see {data / 'up.log'}"
    _until(is_known, START_LIMIT, starting, say, interrupts)
    return found[0]


def _wait_until_it_answers(
    record: Record, data: Path, say: Callable[[str], None], interrupts: Interrupts
) -> None:
    def answers() -> bool:
        if running(data) is None:
            raise StartFailed(f"imagemill did not start: {last_line(data / 'up.log')}")
        try:
            with Client(record.url, patience=0) as client:
                client.get("/healthz")
        except (ServerUnreachable, ApiError):
            return False
        return True

    silent = f"no answer from {record.url} yet; see {data / 'service.log'}"
    _until(answers, START_LIMIT, silent, say, interrupts)


def _wait_until_gone(data: Path, started: subprocess.Popen[bytes] | None) -> None:
    """Return when the private `up` has ended, or when others still use it."""
    deadline, others = time.monotonic() + ENDING_LIMIT, 0
    while time.monotonic() < deadline:
        if not is_held(data / "up.lock") and (started is None or started.poll() is not None):
            return
        others = others + 1 if is_used(data) else 0
        if others == SHARED_LOOKS:
            return
        time.sleep(LOOK_PAUSE)


def _until(
    done: Callable[[], bool],
    limit: float,
    complaint: str,
    say: Callable[[str], None],
    interrupts: Interrupts,
) -> None:
    """Wait, and say now and then what for; StartFailed after `limit` seconds."""
    began = time.monotonic()
    told = began
    while not done():
        now = time.monotonic()
        if now - began > limit:
            raise StartFailed(complaint)
        if now - told > NEWS_PAUSE:
            say(complaint)
            told = now
        interrupts.pause(LOOK_PAUSE)


def why_not_ready(client: Client, model: str, since: float) -> tuple[str, bool]:
    """Why a model makes no images yet, as a sentence, and whether it never will.

    It never will when no worker is ready and one that has said so after `since` (seconds since the
    epoch) has failed to load it; older failures may have been mended meanwhile.
    """
    try:
        workers = client.get("/v1/workers")["data"]
    except ImagemillError as error:
        return str(error), False
    mine = [worker for worker in workers if worker.get("model") == model]
    if any(worker["state"] in ("ready", "draining") for worker in mine):
        return "waiting for its turn", False
    failed = [w for w in mine if w["state"] == "failed" and _said(w) >= since]
    if failed:
        return f"the model cannot be loaded: {failed[-1].get('error')}", True
    if any(worker["state"] == "starting" for worker in mine):
        return "loading the model", False
    return NO_WORKER, False


def _said(worker: Mapping[str, Any]) -> float:
    """When a worker last told of itself, in seconds since the epoch."""
    return float(worker.get("at") or worker.get("started") or 0.0)
