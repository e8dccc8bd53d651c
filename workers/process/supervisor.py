"""Starts the workers of a catalog on this machine and keeps them alive.

A worker is one process, or a group of them for a model of several ranks: one worker a device or
group of devices for each model, or the entry's `workers`. One that ends is started again, after a
pause that doubles while it keeps failing; one that says that it can't start as things are, when its
folder or its entry has changed. When one rank of a group ends, so does the rest. SIGTERM passes on
and waits; when the supervisor itself is killed, its workers notice through their lifeline and
drain. Never imports torch.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from jobs.catalog import Catalog
from jobs.errors import ConfigurationError
from jobs.runtime import lifeline
from workers.process.devices import is_slice
from workers.process.launch import GROUP
from workers.process.refusals import FINAL, LOOK_SECONDS, Ground, Notices, ground_of
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a restart: doubling from the first to the longest while a worker keeps failing."""

SETTLED_SECONDS = 60.0
"""A worker that lived this long failed for a new reason: the pause starts anew."""

GRACE_SECONDS = 10.0
"""How much longer than its own drain time a worker may take before it is killed."""

GROUP_GRACE_SECONDS = 5.0
"""How long a leader that lost a rank may take to give back what it holds."""

TICK_SECONDS = 0.1
"""Seconds between two looks at the processes."""

COMMAND = (sys.executable, "-m", "workers")


@dataclass(frozen=True, slots=True)
class Post:
    """A place for one worker: a model, the how-manieth of it, and the device of each rank."""

    model: str
    index: int
    devices: tuple[str, ...]


@dataclass(slots=True)
class _Kept:
    """A post and who is at it. `ranks` are its processes, the leader first; none between lives.

    `lost` is the exit code of the first rank that ended, `patience` when what is left is killed.
    `ground` is what the last start depended on; `is_refused` that it has to change before the next.
    `port` is held for the group's life, so that nobody else is given its number.
    """

    post: Post
    ranks: list[subprocess.Popen[Any]] = field(default_factory=list)
    port: socket.socket | None = None
    lost: int | None = None
    patience: float = 0.0
    started: float = 0.0
    pause: float = FIRST_PAUSE
    due: float = field(default_factory=time.monotonic)
    ground: Ground | None = None
    is_refused: bool = False

    @property
    def key(self) -> str:
        """A name of the post."""
        return f"{self.post.model}.{self.post.index}"

    @property
    def alive(self) -> list[subprocess.Popen[Any]]:
        """The processes that have not ended."""
        return [process for process in self.ranks if process.poll() is None]

    def give_up_port(self) -> None:
        """The group is over."""
        if self.port is not None:
            self.port.close()
            self.port = None


def posts(
    catalog: Catalog, devices: list[str], *, only: str | None = None, count: int | None = None
) -> list[Post]:
    """The workers to start: `count` a model, else its `workers`, else one a device or group of
    them; dealt to the devices that have the fewest.

    `only` names the one model to serve. Raises UnknownModel when the catalog has none such, and
    ConfigurationError for a group that is larger than the devices its entry names. Under torchrun
    they may be those of each of several machines; here there is one.
    """
    places: list[Post] = []
    taken: Counter[str] = Counter()
    for model in catalog if only is None else [catalog.get(only)]:
        own = list(model.devices) or devices
        size = len(own) if model.placement == "split" else model.ranks
        if model.ranks > 1 and any(is_slice(device) for device in own):
            raise ConfigurationError(
                f"model {model.name!r}: a group of {size} ranks can't run on MIG slices, between "
                "which NCCL doesn't work"
            )
        if model.devices and size > len(own) and set(own) != {"cpu"}:
            raise ConfigurationError(
                f"model {model.name!r}: devices names {len(own)} for a group of {size} ranks"
            )
        wanted = model.workers if count is None else count
        for index in range(max(1, len(own) // size) if wanted is None else wanted):
            dealt = _dealt(own, size, taken)
            taken.update(dealt)
            is_split = model.placement == "split"  # one process, which has all of its devices
            places.append(Post(model.name, index, dealt[:1] if is_split else dealt))
    return places


def _dealt(own: Sequence[str], size: int, taken: Mapping[str, int]) -> tuple[str, ...]:
    """The devices of one worker's ranks: neighbours, where the fewest workers are yet.

    A group that is larger than the machine gets devices that there are not, and refuses them with
    a sentence of its own; on the CPU all ranks share it.
    """
    if size > len(own) and set(own) != {"cpu"}:
        kind = own[0].partition(":")[0]
        return tuple(f"{kind}:{rank}" for rank in range(size))
    groups = [
        tuple(own[(first + rank) % len(own)] for rank in range(size))
        for first in range(0, len(own), size)
    ]
    return min(groups, key=lambda group: sum(taken.get(device, 0) for device in group))


class Supervisor:
    """Keeps one worker at every post until told to stop; `command` runs one process of it."""

    def __init__(
        self,
        places: list[Post],
        settings: WorkerSettings,
        notices: Notices,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._kept = [_Kept(post) for post in places]
        self._settings = settings
        self._notices = notices
        self._command = command
        self._stop = threading.Event()

    def run(self) -> int:
        """Start, watch, restart; returns when stopped and every worker has ended."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(signal.SIGINT, lambda *_: self.stop())
        lifeline.watch(self.stop)
        while not self._stop.is_set():
            for kept in self._kept:
                self._tend(kept)
            self._stop.wait(TICK_SECONDS)
        self._end()
        self._notices.end()
        return 0

    def stop(self) -> None:
        """Let `run` end every worker and return."""
        self._stop.set()

    def _tend(self, kept: _Kept) -> None:
        now = time.monotonic()
        if kept.ranks:
            alive = kept.alive
            if len(alive) < len(kept.ranks):
                self._end_rest(kept, now)
            if alive:
                return
            self._note_end(kept, now)
        if now >= kept.due and self._may_start(kept, now):
            self._start(kept)

    def _may_start(self, kept: _Kept, now: float) -> bool:
        """Whether another try may end otherwise: after a refusal, only when something changed."""
        if not kept.is_refused:
            return True
        kept.due = now + LOOK_SECONDS
        if ground_of(self._settings.models, kept.post.model) == kept.ground:
            return False
        log.info("changed; starting a worker again", model=kept.post.model, index=kept.post.index)
        kept.is_refused, kept.pause = False, FIRST_PAUSE
        self._notices.drop(kept.key)
        return True

    def _end_rest(self, kept: _Kept, now: float) -> None:
        """A rank has ended: a leader that is left gives back what it holds, then nobody is left.

        After a drain the followers end by themselves; else they have nothing to save.
        """
        leader, *followers = kept.ranks
        if kept.lost is None:
            codes = [process.returncode for process in kept.ranks]
            kept.lost = next(code for code in codes if code is not None)
            kept.patience = now + GROUP_GRACE_SECONDS
            leader.terminate()
            if kept.lost != 0:
                for process in followers:
                    process.kill()
        elif now > kept.patience:
            for process in kept.ranks:
                process.kill()

    def _note_end(self, kept: _Kept, now: float) -> None:
        codes = {process.returncode for process in kept.ranks}
        if codes & FINAL:
            self._refuse(kept, min(codes & FINAL))
        else:
            self._pause(kept, now)
        kept.ranks, kept.lost = [], None
        kept.give_up_port()

    def _refuse(self, kept: _Kept, code: int) -> None:
        """The worker said that it can't start as things are. Its notice says so from now on."""
        kept.is_refused = True
        log.warning(
            "worker can't start as things are",
            model=kept.post.model,
            index=kept.post.index,
            code=code,
        )
        pids = [process.pid for process in kept.ranks if process.returncode in FINAL]
        self._notices.put(kept.key, pids, kept.post.model, kept.post.devices[0], code)

    def _pause(self, kept: _Kept, now: float) -> None:
        lived = now - kept.started
        kept.pause = FIRST_PAUSE if lived > SETTLED_SECONDS else kept.pause
        kept.due = now + kept.pause
        log.warning(
            "worker ended; starting another",
            model=kept.post.model,
            index=kept.post.index,
            code=kept.lost,
            lived=round(lived, 1),
            pause=kept.pause,
        )
        kept.pause = min(2 * kept.pause, LONGEST_PAUSE)

    def _start(self, kept: _Kept) -> None:
        """Start every rank of the post, the leader last, since it is told of the others."""
        kept.started, size = time.monotonic(), len(kept.post.devices)
        kept.ground = ground_of(self._settings.models, kept.post.model)
        if size == 1:
            kept.ranks = [self._spawn(kept.post, 0, {})]
            return
        kept.port = held_port()
        together = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(kept.port.getsockname()[1]),
        }
        for rank in [*range(1, size), 0]:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                told = zip(kept.ranks, kept.post.devices[1:], strict=True)
                own[GROUP] = ",".join(f"{process.pid}={device}" for process, device in told)
            kept.ranks.append(self._spawn(kept.post, rank, {**together, **own}))
        kept.ranks.insert(0, kept.ranks.pop())

    def _spawn(self, post: Post, rank: int, place: dict[str, str]) -> subprocess.Popen[Any]:
        env = {**os.environ, "OMP_NUM_THREADS": str(self._settings.threads), **place}
        argv = [*self._command, "--model", post.model]
        argv += ["--index", str(post.index), "--device", post.devices[rank]]
        return lifeline.spawn(argv, env=env, stdin=subprocess.DEVNULL)

    def _end(self) -> None:
        """Ask every worker to drain, and kill those that do not."""
        for kept in self._kept:
            if kept.ranks:
                kept.ranks[0].terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + GRACE_SECONDS
        while left := [kept for kept in self._kept if kept.alive]:
            now = time.monotonic()
            for kept in left:
                if now > deadline:
                    log.error("worker does not drain; killing it", pid=kept.ranks[0].pid)
                    for process in kept.ranks:
                        process.kill()
                elif len(kept.alive) < len(kept.ranks):
                    self._end_rest(kept, now)
            time.sleep(TICK_SECONDS)
        for kept in self._kept:
            kept.give_up_port()


def held_port() -> socket.socket:
    """A socket bound to a free port, not listening.

    While it is held nobody is given the port by chance; rank 0 can listen on it all the same,
    since both bind with SO_REUSEADDR.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held
