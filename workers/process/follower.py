"""A rank of a group that does not lead: computes what its leader asks for, and knows no queue.

It takes no signals for an end: its leader drains, and then says that it is over. It ends by itself
when the leader is lost, and when whoever started it is.
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
from jobs.runtime.embedded_queue import redis_url
from pipelines.load import load_follower
from workers.heartbeat import worker_name
from workers.process.launch import EXIT_GROUP_LOST, ORPHANED_SECONDS, Place, exit_code
from workers.process.worker import FAILED_SECONDS
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

LEADERLESS_SECONDS = ORPHANED_SECONDS + 2.0
"""How long after the starter's death its leader may still need it."""


def run_follower(model: Model, place: Place, settings: WorkerSettings) -> int:
    """Load this rank's share and follow until dismissed; the process's exit code."""
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
    except Exception as error:  # whatever the libraries raise, people are told why
        _tell(model, place, settings, error)
        return exit_code(error, model)
    return 0


def _end_soon() -> None:
    timer = threading.Timer(LEADERLESS_SECONDS, os._exit, (EXIT_GROUP_LOST,))
    timer.daemon = True
    timer.start()


def _tell(model: Model, place: Place, settings: WorkerSettings, error: Exception) -> None:
    """Say why this rank cannot work, to the log and to whoever asks the queue for the workers."""
    plain = str(error) if isinstance(error, ImagemillError) else f"{type(error).__name__}: {error}"
    reason = f"rank {place.rank}: {plain}"
    log.error("rank cannot work", model=model.name, reason=reason)
    if isinstance(error, ConfigurationError):
        sys.stderr.write(f"{error}\n")
    info = {
        "model": model.name,
        "state": "failed",
        "error": reason,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "device": place.device,
        "placement": model.placement,
        "ranks": model.ranks,
        "started": time.time(),
    }
    try:
        with redis_url(settings) as url:
            store = Store.connect(url, pool=settings.pool)
            store.register(worker_name(model.name, place.index), info, FAILED_SECONDS)
            store.close()
    except ImagemillError as untold:
        log.warning("queue unavailable", reason=str(untold))
