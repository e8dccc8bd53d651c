"""Finds the server that a command talks to, or starts a private one for as long as it's needed.

Order: the given address (or IMAGEMILL_SERVER), then the `up` running on the data folder, then, for
`generate` and `replay` only, a private `up`. `up_lock.py` has the locks that this relies on.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imagemill.client.clients import Client
from imagemill.client.errors import ApiError, NoServer, ServerUnreachable, StartFailed
from imagemill.local.children import environment, last_line, module, open_log
from imagemill.local.up_lock import Record, Users, is_held, is_used, running
from imagemill.terminal.interrupts import Interrupts
from jobs.catalog import load_catalog
from jobs.errors import ImagemillError

LONELY_SECONDS = 30.0
"""Seconds without any worker after which the user is told where to look."""

NO_WORKER, WAITING = "waiting for a worker", "waiting for the server"
LOOK_PAUSE = 0.1
FIRST_PATIENCE = 2.0
"""Seconds of retries when first contacting a named server, since the address may be wrong."""

LOCAL_PATIENCE = 600.0
"""Seconds of retries with a local server, because its `up` restarts a crashed service."""

START_LIMIT = 1800.0
"""Seconds for a running `up` to answer; models may continue loading afterwards."""

ENDING_LIMIT = 600.0
"""Seconds to wait for a private `up` to end."""

NEWS_PAUSE = 30.0
"""Seconds between two messages about what a command is waiting for."""

SHARED_LOOKS = 3
"""Consecutive checks that must find another user before a private `up` is left to that user.

One check isn't enough: `is_used` also takes another process's check for a user.
"""


def resolve_server(server: str | None, data: Path) -> str:
    """The address for commands that never start a server; raises NoServer if none is running."""
    address = server or os.environ.get("IMAGEMILL_SERVER")
    if address:
        return address
    record = running(data)
    if record is None:
        raise NoServer(
            f"no server is running on the data folder {data}; start one with `imagemill up`, or "
            "name one with --server or IMAGEMILL_SERVER"
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
    """A client for the named server, or for a local one that's kept running inside the context.

    Also yields whether the server is private. `say` receives what happened, `note` what the client
    is waiting for. Raises Interrupted if the user stops the wait.
    """

    def pause(seconds: float) -> None:
        note(WAITING)
        interrupts.pause(seconds)

    address = server or os.environ.get("IMAGEMILL_SERVER")
    if address:
        # Fail fast if the address is wrong; once it has answered, sit out longer outages.
        with Client(address, patience=FIRST_PATIENCE, pause=interrupts.pause) as first:
            first.get("/healthz")
        with Client(address, pause=pause) as client:
            yield client, False
        return

    with _local(data, models, say, interrupts) as record:

        def pause_while_up_runs(seconds: float) -> None:
            # Retrying makes sense only while there is an `up` to restart the service. Its lock
            # tells immediately, however it ended.
            if running(data) is None:
                raise ServerUnreachable(record.url, f"the `up` on {data} has ended")
            pause(seconds)

        patience = LOCAL_PATIENCE
        with Client(record.url, patience=patience, pause=pause_while_up_runs) as client:
            yield client, record.private


@contextmanager
def _local(
    data: Path, models: Path, say: Callable[[str], None], interrupts: Interrupts
) -> Iterator[Record]:
    """The folder's `up`, found or started; waits for a private one to end."""
    users, started = Users(data), None
    record: Record | None = None
    try:
        # Become a user before looking for an `up`: a private one found afterwards can't end while
        # we use it. Joining fails only while a private one is ending.
        ending = f"the previous `up` on {data} hasn't ended yet"
        _until(users.join, ENDING_LIMIT, ending, say, interrupts)
        record = running(data)
        if record is None:
            say(f"starting imagemill on {data}")
            started = _start(data, models)
            record = _wait_for_address(data, started, say, interrupts)
        else:
            say(f"using imagemill at {record.url}")
        _wait_until_it_answers(record, data, say, interrupts)
        yield record
    finally:
        # Leave first, because a private `up` ends once it has no users. Then wait for it, so that a
        # following command finds the folder free; but not after a second Ctrl-C.
        users.leave()
        is_private = started is not None or (record is not None and record.private)
        if is_private and not isinstance(sys.exception(), KeyboardInterrupt):
            _wait_until_gone(data, started)


def _start(data: Path, models: Path) -> subprocess.Popen[bytes]:
    """Start `up --private`, which ends by itself once it has no users."""
    load_catalog(models)  # report mistakes in it here instead of in a log
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


def _wait_for_address(
    data: Path,
    process: subprocess.Popen[bytes],
    say: Callable[[str], None],
    interrupts: Interrupts,
) -> Record:
    """Wait for the address of the started process, or of one that got the lock before it."""
    records: list[Record] = []

    def is_known() -> bool:
        # Check for the exit first, so that the checks below see everything that happened before it,
        # such as another `up` taking the lock.
        has_ended = process.poll() is not None
        record = running(data)
        if record is not None:
            records.append(record)
        elif has_ended and not is_held(data / "up.lock"):
            # If the lock is held, another `up` was faster and will announce its address.
            raise StartFailed(f"imagemill failed to start: {last_line(data / 'up.log')}")
        return record is not None

    starting = f"imagemill hasn't started yet; see {data / 'up.log'}"
    _until(is_known, START_LIMIT, starting, say, interrupts)
    return records[0]


def _wait_until_it_answers(
    record: Record, data: Path, say: Callable[[str], None], interrupts: Interrupts
) -> None:
    def answers() -> bool:
        if running(data) is None:
            raise StartFailed(f"imagemill failed to start: {last_line(data / 'up.log')}")
        try:
            with Client(record.url, patience=0) as client:
                client.get("/healthz")
        except (ServerUnreachable, ApiError):
            return False
        return True

    waiting = f"no answer from {record.url} yet; see {data / 'service.log'}"
    _until(answers, START_LIMIT, waiting, say, interrupts)


def _wait_until_gone(data: Path, started: subprocess.Popen[bytes] | None) -> None:
    """Return once the private `up` has ended, or if others are still using it."""
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
    message: str,
    say: Callable[[str], None],
    interrupts: Interrupts,
) -> None:
    """Wait for `done`, repeating `message` now and then; StartFailed after `limit` seconds."""
    began = time.monotonic()
    reported = began
    while not done():
        now = time.monotonic()
        if now - began > limit:
            raise StartFailed(message)
        if now - reported > NEWS_PAUSE:
            say(message)
            reported = now
        interrupts.pause(LOOK_PAUSE)


def why_not_ready(client: Client, model: str, since: float) -> tuple[str, bool]:
    """Why a model isn't generating images yet, as a sentence, and whether waiting is hopeless.

    It's hopeless if no worker is ready and one has reported after `since` (seconds since the epoch)
    that it failed to load the model. Older failures may have been fixed since.
    """
    try:
        workers = client.workers()
    except ImagemillError as error:
        return str(error), False
    mine = [worker for worker in workers if worker.model == model]
    if any(worker.state in ("ready", "draining") for worker in mine):
        return "waiting for its turn", False
    failed = [w for w in mine if w.state == "failed" and (w.at or w.started or 0.0) >= since]
    if failed:
        return f"couldn't load the model: {failed[-1].error}", True
    if any(worker.state == "starting" for worker in mine):
        return "loading the model", False
    return NO_WORKER, False
