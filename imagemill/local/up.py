"""`imagemill up`: runs the queue server, service and workers of one machine as child processes.

    up ── queue server    the embedded one, unless IMAGEMILL_REDIS_URL names another
       ├─ service         python -m service
       └─ workers         python -m workers, which starts and watches the worker processes

Crashed children are restarted. All of them end with this process, even if it's killed. A `private`
`up` belongs to the `generate` commands that use it and ends with the last of them. Never imports
torch.
"""

import errno
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from imagemill.client.errors import StartFailed
from imagemill.local.children import (
    Child,
    ManagedChild,
    Program,
    Queue,
    environment,
    last_line,
    module,
)
from imagemill.local.find_server import LONELY_SECONDS
from imagemill.local.up_lock import Record, Users, announce, claimed, withdraw
from jobs.catalog import BUILT_IN, Catalog, load_catalog
from jobs.errors import StorageUnavailable
from jobs.queue.store import Store
from jobs.reports import WorkerReport
from jobs.runtime import lifeline
from jobs.runtime.settings import QueueSettings
from service.keys import KeyRing
from service.settings import ServiceSettings

TICK = 0.1
"""Seconds between two checks of the children."""

PROBE_PAUSE = 0.25
"""Seconds between two checks whether everything is ready."""

DRAIN_LIMIT, STOP_LIMIT = 60.0, 15.0
"""Seconds that the workers and the service get to stop before they're killed."""

BAD_SETTINGS = 2
"""The exit code of a service or supervisor with invalid settings; restarting it is pointless."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The options of `up`; `workers` overrides the catalog's count for every model."""

    host: str
    port: int
    data: Path
    models: Path
    workers: int | None = None
    private: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """What to show once every model has a worker that's ready or has failed.

    `keys` counts the API keys; `is_exposed`: whether other machines can reach the service.
    """

    url: str
    options: UpOptions
    catalog: Catalog
    workers: list[WorkerReport]
    keys: int
    is_exposed: bool

    @property
    def add_key(self) -> str:
        """The command that creates an API key for this server."""
        return shlex.join(["imagemill", "keys", "add", "NAME", *self._data_flag])

    @property
    def _data_flag(self) -> list[str]:
        data = self.options.data
        return ["--data", str(data)] if data != Path("data") else []

    @property
    def example(self) -> str:
        """A command that generates a first image here."""
        words = ["imagemill", "generate", "a large red circle on a blue background"]
        return shlex.join([*words, *self._data_flag])

    @property
    def failures(self) -> list[str]:
        """A sentence for each worker that failed to start."""
        failed = [worker for worker in self.workers if worker.failed]
        return sorted({f"{worker.model}: {worker.error}" for worker in failed})


def run_up(
    options: UpOptions, say: Callable[[str], None], show_ready: Callable[[Ready], None]
) -> None:
    """Run until asked to stop, leaving no processes behind.

    Raises AlreadyRunning, StartFailed or ConfigurationError if it can't start. `say` receives
    messages; `show_ready` is called once.
    """
    settings = QueueSettings.read(data=options.data, models=options.models)
    catalog = load_catalog(options.models)
    with claimed(options.data):
        port = choose_port(options.host, options.port)
        url = f"http://{reachable(options.host)}:{port}"
        launcher = Launcher(options, settings, catalog, port, url, say, show_ready)
        launcher.run()


def choose_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0; raises StartFailed if it can't be bound."""
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
                f"port {port} on {host} is already in use; choose another with --port, or let "
                "--port 0 pick a free one"
            ) from error
        raise StartFailed(f"can't listen on {host} port {port}: {error.strerror}") from error


def reachable(host: str) -> str:
    """The host under which this machine can connect to a server listening on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def loads(catalog: Catalog, options: UpOptions) -> Iterator[str]:
    """What will be loaded, and which catalog says so."""
    if options.models == BUILT_IN:
        yield "serving the bundled model, as no models.toml is here; `imagemill init` writes one"
    else:
        yield f"serving {len(catalog)} model{'' if len(catalog) == 1 else 's'} of {options.models}"
    for model in catalog:
        count = model.workers if options.workers is None else options.workers
        workers = "as many workers as the devices hold" if count is None else f"{count} workers"
        workers = "1 worker" if count == 1 else workers
        kind = ", ".join(filter(None, [model.dtype, model.quantization_text, model.placement]))
        yield f"loading {model.name} from {model.source} ({kind}; {workers})"


class Launcher:
    """Starts, watches and stops the children."""

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
        self._children: list[ManagedChild] = []
        self._asked_to_stop = 0
        self._wake = threading.Event()
        self._http = httpx.Client(base_url=url, timeout=2, trust_env=False)
        self._redis_url = ""
        self._store: Store | None = None
        self._is_ready, self._began = False, time.time()
        self._lonely_since: float | None = time.monotonic()
        self._next_probe = 0.0

    def run(self) -> None:
        """Start the children, watch them until asked to stop, and stop them."""
        with ExitStack() as stack:
            stack.callback(self._http.close)
            # The stack unwinds in reverse: `_end` runs first, while the handlers are still in
            # place, so a second Ctrl-C reaches `stop`, which makes `_end` kill the children.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.signal(number, lambda *_: self.stop())
                stack.callback(signal.signal, number, before)
            lifeline.watch(self.stop)
            # Registered before `_start`, so a failed start also stops the children it has started.
            stack.callback(self._end)
            self._start()
            while not self._asked_to_stop and not (self._options.private and self._is_unused()):
                self._tend()
                self._wake.wait(TICK)
            self._say(
                "stopping after the running images finish (press Ctrl-C again to stop immediately)"
            )

    def stop(self) -> None:
        """Ask to stop; a second call kills the children instead of waiting for them."""
        self._asked_to_stop += 1
        self._wake.set()

    def _start(self) -> None:
        self._say(f"starting imagemill on {self._options.data} at {self._url}")
        for sentence in loads(self._catalog, self._options):
            self._say(sentence)
        data = self._options.data.absolute()
        redis_url = self._settings.redis_url
        if redis_url is None:
            # The service and the workers need its address, so it starts first.
            queue = Queue(data, self._settings.redis_server)
            self._start_child(queue)
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
        self._start_child(Program("service", module("service"), env, data / "service.log"))
        self._start_child(Program("workers", supervisor, env, data / "workers.log"))
        # Others may connect from now on; they retry until the service answers.
        announce(data, Record(os.getpid(), self._url, self._options.private))

    def _start_child(self, child: Child) -> None:
        managed = ManagedChild(child)
        self._children.append(managed)
        managed.start()

    def _is_unused(self) -> bool:
        """Whether this private `up` has no users left; if so, none can join until it has ended."""
        users = Users(self._options.data)
        if users.is_empty():
            # Keep holding the exclusive lock until this process is gone: a `generate` that starts
            # now must not join an `up` that's ending. It waits and starts its own.
            return True
        users.leave()
        return False

    def _tend(self) -> None:
        for managed in self._children:
            self._refuse_bad_settings(managed.child)
            news = managed.tend()
            if news:
                self._say(news)
        if not self._is_ready and time.monotonic() >= self._next_probe:
            self._probe()
            self._next_probe = time.monotonic() + PROBE_PAUSE

    def _refuse_bad_settings(self, child: Child) -> None:
        if isinstance(child, Program) and child.code == BAD_SETTINGS and not self._is_ready:
            raise StartFailed(f"the {child.name} failed to start: {child.last_words()}")

    def _probe(self) -> None:
        """Show the ready panel once every model has a worker that's ready or has failed."""
        try:
            self._http.get("/healthz").raise_for_status()
            listed = self._list_workers()
        except (httpx.HTTPError, StorageUnavailable):
            return
        workers = [worker for worker in listed if not self._is_stale(worker)]
        self._report_missing_workers(workers)
        settled = {worker.model for worker in workers if worker.ready or worker.failed}
        models = {model.name for model in self._catalog}
        if self._options.workers == 0 or models <= settled:
            self._is_ready = True
            self._show_ready(self._ready(workers))

    def _list_workers(self) -> list[WorkerReport]:
        """All workers, read from the queue because the service might require an API key."""
        if self._store is None:
            self._store = Store.connect(self._redis_url, pool=self._settings.pool)
        return [worker.report for worker in self._store.workers()]

    def _ready(self, workers: list[WorkerReport]) -> Ready:
        return Ready(
            url=self._url,
            options=self._options,
            catalog=self._catalog,
            workers=workers,
            keys=len(KeyRing(self._options.data / "keys.json").all()),
            is_exposed=not ServiceSettings.read(host=self._options.host).loopback,
        )

    def _is_stale(self, worker: WorkerReport) -> bool:
        """Whether the queue still lists this worker from an earlier `up` on this machine."""
        started = self._began if worker.started is None else worker.started
        return worker.host == socket.gethostname() and started < self._began

    def _report_missing_workers(self, workers: list[WorkerReport]) -> None:
        """Say once where to look if workers die before they can register."""
        if workers:
            self._lonely_since = None
        elif self._lonely_since and time.monotonic() - self._lonely_since > LONELY_SECONDS:
            log = self._options.data / "workers.log"
            self._say(f"no worker has reported yet; the last line of {log}: {last_line(log)}")
            self._lonely_since = None

    def _end(self) -> None:
        """Stop the children, workers first, so that what they finish can still be saved."""
        # Withdraw the address first, so that no command connects to a server that's ending.
        withdraw(self._options.data)
        if self._store is not None:
            self._store.close()
        # Reverse order of starting: the queue server goes last, because the others write to it.
        for managed in reversed(self._children):
            child = managed.child
            child.stop()
            limit = DRAIN_LIMIT if child.name == "workers" else STOP_LIMIT
            deadline = time.monotonic() + limit
            while not child.gone(TICK):
                if self._asked_to_stop > 1 or time.monotonic() > deadline:
                    child.kill()
