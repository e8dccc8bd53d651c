"""A rank of a group other than the leader: computes what the leader asks for.

It ignores SIGTERM and SIGINT, because its leader drains first and then dismisses it. It exits by
itself if it loses the leader, or some time after the process that started it has died.
"""

import os
import signal
import socket
import sys
import threading
import time

import structlog

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost, ImagemillError
from jobs.queue.store import Store
from jobs.reports import WorkerReport
from jobs.runtime.embedded_queue import redis_url
from pipelines.load import load_follower
from workers.heartbeat import worker_name
from workers.process.launch import EXIT_GROUP_LOST, ORPHANED_SECONDS, Place, exit_code
from workers.process.worker import FAILED_SECONDS
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

LEADERLESS_SECONDS = ORPHANED_SECONDS + 2.0
"""How long the leader may still need this rank after the process that started it died."""


def run_follower(model: Model, place: Place, settings: WorkerSettings) -> int:
    """Load this rank's share and follow until dismissed; returns the process's exit code."""
    is_following = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None if is_following.is_set() else os._exit(0))
    place.watch_starter(_end_soon)
    try:
        follower = load_follower(model, place.device)
        is_following.set()
        log.info("following", model=model.name, rank=place.rank, device=place.device)
        follower.run()
    except GroupLost as error:
        log.error("group lost", model=model.name, rank=place.rank, reason=str(error))
        return EXIT_GROUP_LOST
    except Exception as error:  # libraries may raise anything, and people need to read why
        _report(model, place, settings, error)
        return exit_code(error, model)
    return 0


def _end_soon() -> None:
    timer = threading.Timer(LEADERLESS_SECONDS, os._exit, (EXIT_GROUP_LOST,))
    timer.daemon = True
    timer.start()


def _report(model: Model, place: Place, settings: WorkerSettings, error: Exception) -> None:
    """Log why this rank can't work, and register the reason in the queue."""
    plain = str(error) if isinstance(error, ImagemillError) else f"{type(error).__name__}: {error}"
    reason = f"rank {place.rank}: {plain}"
    log.error("rank can't start", model=model.name, reason=reason)
    if isinstance(error, ConfigurationError):
        sys.stderr.write(f"{error}\n")
    report = WorkerReport(
        model=model.name,
        state="failed",
        error=reason,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=place.device,
        placement=model.placement,
        ranks=model.ranks,
        started=time.time(),
    )
    try:
        with redis_url(settings) as url:
            store = Store.connect(url, pool=settings.pool)
            store.register(worker_name(model.name, place.index), report, FAILED_SECONDS)
            store.close()
    except ImagemillError as unavailable:
        log.warning("queue unavailable", reason=str(unavailable))
