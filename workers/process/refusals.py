"""Workers that can't start until their catalog entry or their model's folder changes.

Another try would load for minutes and fail the same way, so the supervisor waits for a change.
Meanwhile `Notices` keeps the worker's reason registered, so `/v1/workers` and `/readyz` show it.
Never imports torch.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from jobs.catalog import Model, load_catalog
from jobs.errors import ImagemillError
from jobs.queue.store import Store
from jobs.reports import WorkerReport
from workers.process.launch import EXIT_CONFIGURATION, EXIT_UNLOADABLE

log = structlog.get_logger(__name__)

FINAL = frozenset({EXIT_CONFIGURATION, EXIT_UNLOADABLE})
"""Exit codes after which another try would fail the same way."""

LOOK_SECONDS = 2.0
"""Seconds between checks for changes of the entry or the folder."""

NOTICE_SECONDS, RENEW_SECONDS = 90.0, 20.0
"""How long a notice outlives the supervisor, and how often it is renewed."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What a worker's start depends on: its catalog entry and its folder's files.

    If the catalog can't be read, `catalog` is its size and modification time. Equal values mean
    that nothing has changed.
    """

    entry: Model | None
    catalog: tuple[int, int] | None
    files: tuple[tuple[str, int, int], ...]


def ground_of(catalog: Path, name: str) -> Ground:
    """What starting a worker of the model depends on now."""
    stamp = _stamp(catalog)
    try:
        entry = load_catalog(catalog).get(name)
    except ImagemillError:
        return Ground(None, stamp, ())
    places = [entry.path if entry.local else None, entry.config, *entry.components.values()]
    here = sorted({place for place in places if place is not None and Path(place).is_absolute()})
    return Ground(entry, None, tuple(file for place in here for file in _files(Path(place))))


def _files(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of a file, or of a folder's files, following links.

    Goes three levels deep, which is more than a diffusers folder has.
    """
    paths = {path, *path.glob("*"), *path.glob("*/*"), *path.glob("*/*/*")}
    stamped = ((str(file), _stamp(file)) for file in sorted(paths))
    return tuple((name, *stamp) for name, stamp in stamped if stamp)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (0 if path.is_dir() else stat.st_size), stat.st_mtime_ns


@dataclass(slots=True)
class _Notice:
    """The report of one refused worker; `name` is its registration's name, once known."""

    pids: frozenset[int]
    report: WorkerReport
    name: str | None = None


class Notices:
    """Keeps refused workers registered until each is tried again. `key` identifies the worker.

    Uses the store on a thread of its own, so an unavailable queue doesn't block the supervisor.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._notices: dict[str, _Notice] = {}
        self._gone: set[str] = set()
        self._logged: set[tuple[str | None, str | None]] = set()
        self._news, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def put(self, key: str, pids: Sequence[int], model: str, device: str, code: int) -> None:
        """Keep the reason registered by one of these processes, or a default if there's none."""
        report = WorkerReport(
            model=model,
            state="failed",
            error=f"its worker exited with code {code}; see the workers' log for the reason",
            pid=pids[0],
            host=socket.gethostname(),
            device=device,
            started=time.time(),
        )
        with self._lock:
            self._notices[key] = _Notice(frozenset(pids), report)
        if not self._thread.is_alive() and not self._ended.is_set():
            self._thread.start()
        self._news.set()

    def drop(self, key: str) -> None:
        """Remove the notice, because the worker is tried again."""
        with self._lock:
            notice = self._notices.pop(key, None)
            if notice is None:
                return
            if notice.name is not None:
                self._gone.add(notice.name)
            self._logged.discard((notice.report.model, notice.report.error))
        self._news.set()

    def end(self, seconds: float = 5.0) -> None:
        """Remove all notices; returns after `seconds` at the latest."""
        for key in list(self._notices):
            self.drop(key)
        self._ended.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        store: Store | None = None
        while True:
            self._news.clear()
            is_last = self._ended.is_set()
            pause = RENEW_SECONDS
            try:
                store = store or self._connect()
                self._renew(store)
            except ImagemillError as error:
                log.warning("queue unavailable", reason=str(error))
                pause = LOOK_SECONDS
            if is_last:
                break
            self._news.wait(pause)
        if store is not None:
            store.close()

    def _renew(self, store: Store) -> None:
        known = {worker.id: worker.report for worker in store.workers()}
        with self._lock:
            for key, notice in self._notices.items():
                if notice.name is None:
                    self._take_over(key, notice, known)
            notices, gone = list(self._notices.values()), set(self._gone)
        for notice in notices:
            assert notice.name is not None
            store.register(notice.name, replace(notice.report, at=time.time()), NOTICE_SECONDS)
        for name in gone:
            store.unregister(name)
        with self._lock:
            self._gone -= gone

    def _take_over(self, key: str, notice: _Notice, known: Mapping[str, WorkerReport]) -> None:
        """Continue the worker's own registration, if any; log its error once per model."""
        notice.name = f"{notice.report.host}.{key}.refused"
        for name, report in known.items():
            is_same = report.host == notice.report.host and report.pid in notice.pids
            if is_same and report.failed:
                notice.name, notice.report = name, report
        model, reason = notice.report.model, notice.report.error
        if (model, reason) not in self._logged:
            self._logged.add((model, reason))
            log.error(
                "model can't be served; will retry when its folder or catalog entry changes",
                model=model,
                reason=reason,
            )
