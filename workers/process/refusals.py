"""Workers that can't start until something changes: what would have to change, and who is told.

Trying again costs minutes of loading and says the same sentence. The supervisor tries again when
the entry in the catalog or the model's folder has changed. Meanwhile `Notices` keeps the worker's
reason where `/v1/workers` and `/readyz` find it. Never imports torch.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from jobs.catalog import Model, load_catalog
from jobs.errors import ImagemillError
from jobs.queue.store import Store
from workers.process.launch import EXIT_CONFIGURATION, EXIT_UNLOADABLE

log = structlog.get_logger(__name__)

FINAL = frozenset({EXIT_CONFIGURATION, EXIT_UNLOADABLE})
"""Exit codes after which another try would end the same way."""

LOOK_SECONDS = 2.0
"""Seconds between two looks whether the entry or the folder has changed."""

NOTICE_SECONDS, RENEW_SECONDS = 90.0, 20.0
"""How long a notice outlives the supervisor, and how often it is renewed."""


@dataclass(frozen=True, slots=True)
class Ground:
    """All that a worker's start depends on here: its entry, and its folder's files.

    `catalog` is the catalog's size and time where it can't be read. Two that are equal mean that
    nothing has changed.
    """

    entry: Model | None
    catalog: tuple[int, int] | None
    files: tuple[tuple[str, int, int], ...]


def ground_of(catalog: Path, name: str) -> Ground:
    """What the start of a worker of the model depends on, as it is now."""
    stamp = _stamp(catalog)
    try:
        entry = load_catalog(catalog).get(name)
    except ImagemillError:
        return Ground(None, stamp, ())
    places = [entry.path if entry.local else None, entry.config, *entry.components.values()]
    here = sorted({place for place in places if place is not None and Path(place).is_absolute()})
    return Ground(entry, None, tuple(file for place in here for file in _files(Path(place))))


def _files(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of a file, or of a folder's files, links followed.

    Three levels deep, which is more than a diffusers folder has.
    """
    found = {path, *path.glob("*"), *path.glob("*/*"), *path.glob("*/*/*")}
    stamped = ((str(each), _stamp(each)) for each in sorted(found))
    return tuple((name, *stamp) for name, stamp in stamped if stamp)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return (0 if path.is_dir() else seen.st_size), seen.st_mtime_ns


@dataclass(slots=True)
class _Notice:
    """What is said of one place for a worker. `name` is its registration's, once it has one."""

    pids: frozenset[int]
    info: dict[str, Any]
    name: str | None = None


class Notices:
    """Keeps what refused workers registered, until each is tried again. `key` names a place.

    The store is asked on a thread of its own, so that a queue server that is away doesn't keep the
    supervisor from its other workers.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._kept: dict[str, _Notice] = {}
        self._gone: set[str] = set()
        self._said: set[tuple[str, str]] = set()
        self._news, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)

    def put(self, key: str, pids: Sequence[int], model: str, device: str, code: int) -> None:
        """Keep the reason that one of these processes registered, or that they registered none."""
        info = {
            "model": model,
            "state": "failed",
            "error": f"its worker ended with exit code {code}; the workers' log says why",
            "pid": pids[0],
            "host": socket.gethostname(),
            "device": device,
            "started": time.time(),
        }
        with self._lock:
            self._kept[key] = _Notice(frozenset(pids), info)
        if not self._thread.is_alive() and not self._ended.is_set():
            self._thread.start()
        self._news.set()

    def drop(self, key: str) -> None:
        """The worker is tried again."""
        with self._lock:
            notice = self._kept.pop(key, None)
            if notice is None:
                return
            if notice.name is not None:
                self._gone.add(notice.name)
            self._said.discard((notice.info["model"], notice.info["error"]))
        self._news.set()

    def end(self, seconds: float = 5.0) -> None:
        """Take all notices back; returns after that long at the latest."""
        for key in list(self._kept):
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
        known = {worker.id: worker.info for worker in store.workers()}
        with self._lock:
            for key, notice in self._kept.items():
                if notice.name is None:
                    self._take_over(key, notice, known)
            kept, gone = list(self._kept.values()), set(self._gone)
        for notice in kept:
            assert notice.name is not None
            store.register(notice.name, {**notice.info, "at": time.time()}, NOTICE_SECONDS)
        for name in gone:
            store.unregister(name)
        with self._lock:
            self._gone -= gone

    def _take_over(self, key: str, notice: _Notice, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with what the worker itself registered, under its own name; say it once a model."""
        notice.name = f"{notice.info['host']}.{key}.refused"
        for name, info in known.items():
            is_its = info.get("host") == notice.info["host"] and info.get("pid") in notice.pids
            if is_its and info.get("state") == "failed":
                notice.name, notice.info = name, dict(info)
        said = notice.info["model"], notice.info["error"]
        if said not in self._said:
            self._said.add(said)
            log.error(
                "model can't be served; tried again when its folder or entry changes",
                model=said[0],
                reason=said[1],
            )
