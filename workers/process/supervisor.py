"""Starts the workers of a catalog on this machine and keeps them running.

A worker is one process, or a group of processes if its model has several ranks. Each model gets one
worker per device or group of devices, or as many as its entry's `workers`. A worker that exits is
restarted after a pause, which doubles while it keeps failing. A worker that reports that it can't
start is restarted when its folder or its catalog entry changes. When one rank of a group exits, the
others are ended too. SIGTERM is passed on, and the supervisor waits for the workers to drain. If
the supervisor itself is killed, workers notice through their lifeline and drain. This module never
imports torch.
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
from jobs.runtime.backoff import Backoff
from workers.process.devices import is_slice
from workers.process.launch import GROUP
from workers.process.refusals import FINAL, LOOK_SECONDS, Ground, Notices, ground_of
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

GRACE_SECONDS = 10.0
"""How much longer than its drain time a worker may take before it's killed."""

GROUP_GRACE_SECONDS = 5.0
"""How long a leader that lost a rank may take to give back its images."""

TICK_SECONDS = 0.1
"""Seconds between checks of the processes."""

COMMAND = (sys.executable, "-m", "workers")


@dataclass(frozen=True, slots=True)
class Post:
    """A worker to run: its model, its index among the model's workers, and each rank's device."""

    model: str
    index: int
    devices: tuple[str, ...]


@dataclass(slots=True)
class _Group:
    """The processes at a post. `ranks` has the leader first; it's empty between two starts.

    `exit_code` is that of the first rank that ended, and `kill_at` when the others are killed.
    `start_at` is when the next start is due. Both are monotonic times. `ground` is what the last
    start depended on, and `is_refused` is set if that has to change before the next one. `port` is
    held while the group runs, so that no other process gets its number.
    """

    post: Post
    ranks: list[subprocess.Popen[Any]] = field(default_factory=list)
    port: socket.socket | None = None
    exit_code: int | None = None
    kill_at: float = 0.0
    started: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)
    start_at: float = field(default_factory=time.monotonic)
    ground: Ground | None = None
    is_refused: bool = False

    @property
    def key(self) -> str:
        """Identifies the post."""
        return f"{self.post.model}.{self.post.index}"

    @property
    def alive(self) -> list[subprocess.Popen[Any]]:
        """The processes that are still running."""
        return [process for process in self.ranks if process.poll() is None]

    def release_port(self) -> None:
        """Free the port, because the group has ended."""
        if self.port is not None:
            self.port.close()
            self.port = None


def posts(
    catalog: Catalog, devices: list[str], *, only: str | None = None, count: int | None = None
) -> list[Post]:
    """List the workers to start, each on the devices with the fewest workers so far.

    Each model gets `count` workers, or its entry's `workers`, or one per device or group of
    devices. `only` limits them to one model. Raises UnknownModel if it isn't in the catalog, and
    ConfigurationError if a group is larger than the devices that its entry names. (Under torchrun
    an entry may name the devices of each of several machines, but the supervisor has only one.)
    """
    places: list[Post] = []
    workers_on: Counter[str] = Counter()
    for model in catalog if only is None else [catalog.get(only)]:
        own = list(model.devices) or devices
        size = len(own) if model.placement == "split" else model.ranks
        if model.ranks > 1 and any(is_slice(device) for device in own):
            raise ConfigurationError(
                f"model {model.name!r}: a group of {size} ranks can't run on MIG slices, because "
                "NCCL doesn't work between them"
            )
        if model.devices and size > len(own) and set(own) != {"cpu"}:
            raise ConfigurationError(
                f"model {model.name!r}: devices lists {len(own)} for a group of {size} ranks"
            )
        number = model.workers if count is None else count
        for index in range(max(1, len(own) // size) if number is None else number):
            ranks = _devices_of_ranks(own, size, workers_on)
            workers_on.update(ranks)
            is_split = model.placement == "split"  # one process, which uses all of these devices
            places.append(Post(model.name, index, ranks[:1] if is_split else ranks))
    return places


def _devices_of_ranks(
    own: Sequence[str], size: int, workers_on: Mapping[str, int]
) -> tuple[str, ...]:
    """Adjacent devices for one worker's ranks, those with the fewest workers so far.

    A group larger than the machine gets devices that don't exist, and then reports that itself. On
    the CPU, all ranks share it.
    """
    if size > len(own) and set(own) != {"cpu"}:
        kind = own[0].partition(":")[0]
        return tuple(f"{kind}:{rank}" for rank in range(size))
    groups = [
        tuple(own[(first + rank) % len(own)] for rank in range(size))
        for first in range(0, len(own), size)
    ]
    return min(groups, key=lambda group: sum(workers_on.get(device, 0) for device in group))


class Supervisor:
    """Keeps a worker running at every post until stopped; `command` starts one process."""

    def __init__(
        self,
        places: list[Post],
        settings: WorkerSettings,
        notices: Notices,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._groups = [_Group(post) for post in places]
        self._settings = settings
        self._notices = notices
        self._command = command
        self._stop = threading.Event()

    def run(self) -> int:
        """Start, watch and restart workers; returns once stopped and all workers have exited."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(signal.SIGINT, lambda *_: self.stop())
        lifeline.watch(self.stop)
        while not self._stop.is_set():
            for group in self._groups:
                self._check(group)
            self._stop.wait(TICK_SECONDS)
        self._end()
        self._notices.end()
        return 0

    def stop(self) -> None:
        """Make `run` end all workers and return."""
        self._stop.set()

    def _check(self, group: _Group) -> None:
        now = time.monotonic()
        if group.ranks:
            alive = group.alive
            if len(alive) < len(group.ranks):
                self._end_rest(group, now)
            if alive:
                return
            self._note_end(group, now)
        if now >= group.start_at and self._may_start(group, now):
            self._start(group)

    def _may_start(self, group: _Group, now: float) -> bool:
        """Whether to try again: after a refusal, only once the entry or the folder has changed."""
        if not group.is_refused:
            return True
        group.start_at = now + LOOK_SECONDS
        if ground_of(self._settings.models, group.post.model) == group.ground:
            return False
        log.info(
            "entry or folder changed; starting worker",
            model=group.post.model,
            index=group.post.index,
        )
        group.is_refused = False
        group.backoff.reset()
        self._notices.drop(group.key)
        return True

    def _end_rest(self, group: _Group, now: float) -> None:
        """End the other ranks after one has exited.

        The leader gets time to give its images back. After a drain, followers exit by themselves;
        otherwise they're killed, because they have nothing to save.
        """
        leader, *followers = group.ranks
        if group.exit_code is None:
            codes = [process.returncode for process in group.ranks]
            group.exit_code = next(code for code in codes if code is not None)
            group.kill_at = now + GROUP_GRACE_SECONDS
            leader.terminate()
            if group.exit_code != 0:
                for process in followers:
                    process.kill()
        elif now > group.kill_at:
            for process in group.ranks:
                process.kill()

    def _note_end(self, group: _Group, now: float) -> None:
        codes = {process.returncode for process in group.ranks}
        if codes & FINAL:
            self._refuse(group, min(codes & FINAL))
        else:
            self._pause(group, now)
        group.ranks, group.exit_code = [], None
        group.release_port()

    def _refuse(self, group: _Group, code: int) -> None:
        """Wait for a change before the next start, and keep the reason as a notice."""
        group.is_refused = True
        log.warning(
            "worker can't start until its entry or folder changes",
            model=group.post.model,
            index=group.post.index,
            code=code,
        )
        pids = [process.pid for process in group.ranks if process.returncode in FINAL]
        self._notices.put(group.key, pids, group.post.model, group.post.devices[0], code)

    def _pause(self, group: _Group, now: float) -> None:
        lived = now - group.started
        pause = group.backoff.failed(lived)
        group.start_at = now + pause
        log.warning(
            "worker exited; restarting",
            model=group.post.model,
            index=group.post.index,
            code=group.exit_code,
            lived=round(lived, 1),
            pause=pause,
        )

    def _start(self, group: _Group) -> None:
        """Start all ranks, the leader last because it gets the others' process ids."""
        group.started, size = time.monotonic(), len(group.post.devices)
        group.ground = ground_of(self._settings.models, group.post.model)
        if size == 1:
            group.ranks = [self._spawn(group.post, 0, {})]
            return
        group.port = held_port()
        together = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(group.port.getsockname()[1]),
        }
        for rank in [*range(1, size), 0]:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                followers = zip(group.ranks, group.post.devices[1:], strict=True)
                own[GROUP] = ",".join(f"{process.pid}={device}" for process, device in followers)
            group.ranks.append(self._spawn(group.post, rank, {**together, **own}))
        group.ranks.insert(0, group.ranks.pop())  # the leader, which was started last

    def _spawn(self, post: Post, rank: int, place: dict[str, str]) -> subprocess.Popen[Any]:
        env = {**os.environ, "OMP_NUM_THREADS": str(self._settings.threads), **place}
        argv = [*self._command, "--model", post.model]
        argv += ["--index", str(post.index), "--device", post.devices[rank]]
        return lifeline.spawn(argv, env=env, stdin=subprocess.DEVNULL)

    def _end(self) -> None:
        """Make all workers drain, and kill those that take too long."""
        for group in self._groups:
            if group.ranks:
                group.ranks[0].terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + GRACE_SECONDS
        while left := [group for group in self._groups if group.alive]:
            now = time.monotonic()
            for group in left:
                if now > deadline:
                    log.error("worker didn't drain; killing it", pid=group.ranks[0].pid)
                    for process in group.ranks:
                        process.kill()
                elif len(group.alive) < len(group.ranks):
                    self._end_rest(group, now)
            time.sleep(TICK_SECONDS)
        for group in self._groups:
            group.release_port()


def held_port() -> socket.socket:
    """A socket bound to a free port, not listening.

    While it's open, the system assigns the port to no other process. Rank 0 can still listen on it,
    because both bind with SO_REUSEADDR.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder
