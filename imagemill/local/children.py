"""The processes that `up` keeps alive: how each is started, whether it lives, when to try again.

Knows nothing of what they serve. Every child runs in a session of its own, so that Ctrl-C in the
terminal reaches `up` alone and the order of stopping is `up`'s to decide.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from imagemill.local.up_lock import is_held
from jobs.errors import ImagemillError
from jobs.runtime import lifeline
from jobs.runtime.embedded_queue import EmbeddedServer

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
SETTLED_SECONDS = 60.0
"""A child that lived this long died of something new: its pauses start over."""

LARGEST_LOG = 10 * 2**20
"""Bytes after which a log is set aside at the next start."""

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds our packages: a checkout, or site-packages."""


def environment(**settings: object) -> dict[str, str]:
    """Ours, with `IMAGEMILL_*` for the settings that are given.

    PYTHONSAFEPATH keeps a `service` folder of the user's own, in the folder where the command was
    typed, from being run in place of ours.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {f"IMAGEMILL_{k.upper()}": str(v) for k, v in settings.items() if v is not None}
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, **given}


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs one of our packages."""
    return [sys.executable, "-m", name, *arguments]


class Child(Protocol):
    """Something that should be alive, and is started again when it is not."""

    name: str

    def start(self) -> None:
        """Start it; called again after every death."""

    def alive(self) -> bool:
        """Whether it lives."""

    def last_words(self) -> str:
        """Why it died, as far as one can tell."""

    def stop(self) -> None:
        """Ask it to end; returns at once."""

    def gone(self, seconds: float) -> bool:
        """Wait up to so long for its end; whether it has ended."""

    def kill(self) -> None:
        """End it and all that it started, now."""


class Program:
    """A child process of ours whose output goes to a log file."""

    def __init__(self, name: str, argv: list[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._argv, self._env = argv, env
        self._process: subprocess.Popen[Any] | None = None
        self._orphans: set[int] = set()
        self._killed = False

    def start(self) -> None:
        """Start it, appending to its log."""
        self._killed = False
        with open_log(self.log) as log:
            self._process = lifeline.spawn(
                self._argv,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """The process's id, once started."""
        return self._process.pid if self._process else None

    @property
    def code(self) -> int | None:
        """The exit code of a process that has ended; negative is a signal's number."""
        return self._process.poll() if self._process else None

    def alive(self) -> bool:
        """Whether it lives. What a dead one had started is remembered until it is gone as well."""
        if self._process is None:
            return False
        code = self._process.poll()
        groups = self._orphans if code is None else self._orphans | {self._process.pid}
        self._orphans = {group for group in groups if _has_members(group)}
        return code is None

    def last_words(self) -> str:
        """The signal that killed it, or its exit code and the last line of its log."""
        code = self.code
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}: {last_line(self.log)}"

    def stop(self) -> None:
        """SIGTERM."""
        if self._process is not None:
            self._process.terminate()

    def gone(self, seconds: float) -> bool:
        """Wait up to so long for its end; whether it and all that it started have ended."""
        if self._process is None or self._killed:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if not self.alive() and self._orphans:
            time.sleep(seconds)
        return not self._orphans

    def kill(self) -> None:
        """SIGKILL to its whole process group and to what its earlier lives left behind."""
        if self._process is None:
            return
        self.alive()
        for group in {self._process.pid, *self._orphans}:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._process.wait()
        self._killed = True


def _has_members(group: int) -> bool:
    """Whether any process of that group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Queue:
    """The embedded queue server as a child. Start it from the main thread only."""

    name = "queue server"

    def __init__(self, data: Path, binary: Path | None) -> None:
        self._data, self._binary = data, binary
        self._server: EmbeddedServer | None = None

    def start(self) -> None:
        """Start one or adopt the one that runs; returns when it answers."""
        if self._server is not None:
            self._server.stop()
        self._server = EmbeddedServer.ensure(self._data, self._binary)

    @property
    def url(self) -> str:
        """Where it answers; the same after every restart."""
        assert self._server is not None
        return self._server.url

    def alive(self) -> bool:
        """Whether the process lives, even one too busy to answer: the lock that it holds tells."""
        return is_held(self._data / "queue.alive")

    def last_words(self) -> str:
        """The last line of its log."""
        return last_line(self._data / "queue.log")

    def stop(self) -> None:
        """End it if we started it, everything saved."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def gone(self, seconds: float) -> bool:
        """Nothing to wait for: `stop` has waited."""
        return True

    def kill(self) -> None:
        """As `stop`: ending it takes milliseconds."""
        self.stop()


@dataclass(slots=True)
class Kept:
    """A child and when to start it again; times are of the monotonic clock."""

    child: Child
    started: float = 0.0
    due: float | None = None
    pause: float = FIRST_PAUSE

    def tend(self) -> str | None:
        """Start the child again if it is dead and due; a sentence when there is news."""
        now = time.monotonic()
        if self.due is None:
            if self.child.alive():
                return None
            if now - self.started > SETTLED_SECONDS:
                self.pause = FIRST_PAUSE
            self.due, pause = now + self.pause, self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            why = self.child.last_words()
            return f"the {self.child.name} died ({why}); starting it again in {pause:g} s"
        if now < self.due:
            return None
        try:
            self.start()
        except ImagemillError as error:
            self.due = now + self.pause
            return f"the {self.child.name} does not start: {error}"
        return f"the {self.child.name} runs again"

    def start(self) -> None:
        """Start the child now."""
        self.child.start()
        self.started, self.due = time.monotonic(), None


def open_log(path: Path) -> IO[bytes]:
    """The log, for appending; a large one is set aside as `.1` first."""
    try:
        if path.stat().st_size > LARGEST_LOG:
            path.replace(path.with_name(f"{path.name}.1"))
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return f"nothing in {path}"
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else f"nothing in {path}"
