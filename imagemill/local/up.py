"""`imagemill up`: queue server, service and workers of one machine, as children of one process.

    up ── queue server    the embedded one, unless IMAGEMILL_REDIS_URL names another
       ├─ service         python -m service
       └─ workers         python -m workers, which starts and watches the worker processes

A dead child is started again; all of them end with this process, even when it is killed. A
`private` one belongs to the `generate` commands that use it and ends with the last of them.
Knows no torch and makes no images.
"""

import errno
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from imagemill.client.errors import StartFailed
from imagemill.local.children import Child, Kept, Program, Queue, environment, last_line, module
from imagemill.local.up_lock import Record, Users, announce, claimed, withdraw
from jobs.catalog import Catalog, load_catalog
from jobs.errors import StorageUnavailable
from jobs.queue.store import Store
from jobs.runtime import lifeline
from jobs.runtime.settings import QueueSettings
from service.keys import KeyRing
from service.settings import ServiceSettings

TICK = 0.1
"""Seconds between two looks at the children."""

PROBE_PAUSE = 0.25
"""Seconds between two questions whether all is ready."""

LONELY_SECONDS = 30.0
"""Seconds without any worker after which the user is told where to look."""

DRAIN_LIMIT, STOP_LIMIT = 60.0, 15.0
"""Seconds that the workers and the service get to end by themselves."""

BAD_SETTINGS = 2
"""The exit code of a service or supervisor whose settings cannot work: no use trying again."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `up` was asked for; `workers` overrides the catalog's count for every model."""

    host: str
    port: int
    data: Path
    models: Path
    workers: int | None = None
    private: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """What there is to show once images can be made (or can not: `failures`)."""

    url: str
    options: UpOptions
    catalog: Catalog
    workers: list[dict[str, Any]]
    keys: int
    is_exposed: bool
    """How many API keys there are, and whether other machines can reach the service."""

    @property
    def add_key(self) -> str:
        """The command that makes an API key for this server."""
        return shlex.join(["imagemill", "keys", "add", "NAME", *self._data_flag])

    @property
    def _data_flag(self) -> list[str]:
        data = self.options.data
        return ["--data", str(data)] if data != Path("data") else []

    @property
    def example(self) -> str:
        """A command that makes a first picture here."""
        words = ["imagemill", "generate", "a large red circle on a blue background"]
        return shlex.join([*words, *self._data_flag])

    @property
    def failures(self) -> list[str]:
        """A sentence for each worker that could not start."""
        failed = [worker for worker in self.workers if worker["state"] == "failed"]
        return sorted({f"{worker['model']}: {worker.get('error')}" for worker in failed})


def run_up(
    options: UpOptions, say: Callable[[str], None], show_ready: Callable[[Ready], None]
) -> None:
    """Run until told to stop, and leave nothing behind.

    Raises AlreadyRunning, StartFailed or ConfigurationError when it cannot start. `say` gets
    sentences of news, `show_ready` is called once.
    """
    settings = QueueSettings.read(data=options.data, models=options.models)
    catalog = load_catalog(options.models)
    with claimed(options.data):
        port = choose_port(options.host, options.port)
        url = f"http://{reachable(options.host)}:{port}"
        launcher = Launcher(options, settings, catalog, port, url, say, show_ready)
        launcher.run()


def choose_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0; raises StartFailed where it cannot be listened on."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
            return int(listener.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartFailed(
                f"port {port} on {host} is taken; choose another with --port, or --port 0 for "
                "any that is free"
            ) from error
        raise StartFailed(f"cannot listen on {host} port {port}: {error.strerror}") from error


def reachable(host: str) -> str:
    """A host to connect to from this machine, for one to listen on."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


class Launcher:
    """Starts the children, watches them, stops them."""

    def __init__(
        self,
        options: UpOptions,
        settings: QueueSettings,
        catalog: Catalog,
        port: int,
        url: str,
        say: Callable[[str], None],
        show_ready: Callable[[Ready], None],
    ) -> None:
        self._options, self._settings, self._catalog = options, settings, catalog
        self._port, self._url = port, url
        self._say, self._show_ready = say, show_ready
        self._kept: list[Kept] = []
        self._asked_to_stop = 0
        self._wake = threading.Event()
        self._http = httpx.Client(base_url=url, timeout=2, trust_env=False)
        self._redis_url = ""
        self._store: Store | None = None
        self._is_ready, self._began = False, time.time()
        self._lonely_since: float | None = time.monotonic()
        self._next_probe = 0.0

    def run(self) -> None:
        """Start, watch until stopped, stop all."""
        with ExitStack() as stack:
            stack.callback(self._http.close)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.signal(number, lambda *_: self.stop())
                stack.callback(signal.signal, number, before)
            lifeline.watch(self.stop)
            stack.callback(self._end)
            self._start()
            while not self._asked_to_stop and not (self._options.private and self._is_unused()):
                self._tend()
                self._wake.wait(TICK)
            self._say("stopping; running images are finished first (Ctrl-C again: at once)")

    def stop(self) -> None:
        """Ask for the end; asked twice, the children are killed instead of waited for."""
        self._asked_to_stop += 1
        self._wake.set()

    def _start(self) -> None:
        self._say(f"starting imagemill on {self._options.data}, to answer at {self._url}")
        data = self._options.data.absolute()
        redis_url = self._settings.redis_url
        if redis_url is None:
            queue = Queue(data, self._settings.redis_server)
            self._keep(queue)
            redis_url = queue.url
        self._redis_url = redis_url
        env = environment(
            data=data,
            models=self._options.models.absolute(),
            redis_url=redis_url,
            host=self._options.host,
            port=self._port,
        )
        supervisor = module("workers")
        if self._options.workers is not None:
            supervisor += ["--workers", str(self._options.workers)]
        self._keep(Program("service", module("service"), env, data / "service.log"))
        self._keep(Program("workers", supervisor, env, data / "workers.log"))
        announce(data, Record(os.getpid(), self._url, self._options.private))

    def _keep(self, child: Child) -> None:
        kept = Kept(child)
        self._kept.append(kept)
        kept.start()

    def _is_unused(self) -> bool:
        """Whether this private `up` has no users left; if so, none can join until it has ended."""
        users = Users(self._options.data)
        if users.is_empty():
            return True  # the lock stays ours, until the process is gone
        users.leave()
        return False

    def _tend(self) -> None:
        for kept in self._kept:
            self._refuse_bad_settings(kept.child)
            news = kept.tend()
            if news:
                self._say(news)
        if not self._is_ready and time.monotonic() >= self._next_probe:
            self._probe()
            self._next_probe = time.monotonic() + PROBE_PAUSE

    def _refuse_bad_settings(self, child: Child) -> None:
        if isinstance(child, Program) and child.code == BAD_SETTINGS and not self._is_ready:
            raise StartFailed(f"the {child.name} cannot start: {child.last_words()}")

    def _probe(self) -> None:
        """Show that all is ready, once every model has a worker that is, or that cannot be."""
        try:
            self._http.get("/healthz").raise_for_status()
            listed = self._listed()
        except (httpx.HTTPError, StorageUnavailable):
            return
        workers = [worker for worker in listed if not self._is_stale(worker)]
        self._complain_if_lonely(workers)
        settled = {w["model"] for w in workers if w["state"] in ("ready", "failed")}
        wanted = {model.name for model in self._catalog}
        if self._options.workers == 0 or wanted <= settled:
            self._is_ready = True
            self._show_ready(self._ready(workers))

    def _listed(self) -> list[dict[str, Any]]:
        """All workers, asked of the queue: the service would want a key where there are any."""
        if self._store is None:
            self._store = Store.connect(self._redis_url, pool=self._settings.pool)
        known = self._store.workers()
        return [{"model": None, "state": "unknown", **worker.info} for worker in known]

    def _ready(self, workers: list[dict[str, Any]]) -> Ready:
        return Ready(
            url=self._url,
            options=self._options,
            catalog=self._catalog,
            workers=workers,
            keys=len(KeyRing(self._options.data / "keys.json").all()),
            is_exposed=not ServiceSettings.read(host=self._options.host).loopback,
        )

    def _is_stale(self, worker: dict[str, Any]) -> bool:
        """Whether the entry is of this machine and older than this start: the queue remembers."""
        started = float(worker.get("started", self._began))
        return worker.get("host") == socket.gethostname() and started < self._began

    def _complain_if_lonely(self, workers: list[dict[str, Any]]) -> None:
        """Say once where to look when workers die before they can say anything themselves."""
        if workers:
            self._lonely_since = None
        elif self._lonely_since and time.monotonic() - self._lonely_since > LONELY_SECONDS:
            log = self._options.data / "workers.log"
            self._say(f"no worker has reported yet; the last line of {log}: {last_line(log)}")
            self._lonely_since = None

    def _end(self) -> None:
        """Workers first, so that what they finish can still be kept; then the rest."""
        withdraw(self._options.data)
        if self._store is not None:
            self._store.close()
        for kept in reversed(self._kept):
            child = kept.child
            child.stop()
            limit = DRAIN_LIMIT if child.name == "workers" else STOP_LIMIT
            deadline = time.monotonic() + limit
            while not child.gone(TICK):
                if self._asked_to_stop > 1 or time.monotonic() > deadline:
                    child.kill()
