"""The child processes of `up`: starting, watching and restarting them.

Every child runs in its own session, so Ctrl-C in the terminal reaches only `up`, which decides the
order of stopping.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from imagemill.local.up_lock import is_held
from jobs.errors import ImagemillError
from jobs.runtime import lifeline
from jobs.runtime.backoff import Backoff
from jobs.runtime.embedded_queue import EmbeddedServer

LARGEST_LOG = 10 * 2**20
"""Bytes above which a log is rotated at the next start."""

ROOT = Path(__file__).resolve().parents[2]
"""The folder of our packages: a checkout or site-packages."""


def environment(**settings: object) -> dict[str, str]:
    """This process's environment, with `IMAGEMILL_*` variables for the given settings.

    PYTHONSAFEPATH prevents a `service` folder in the user's current folder from being imported
    instead of ours.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {f"IMAGEMILL_{k.upper()}": str(v) for k, v in settings.items() if v is not None}
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, **variables}


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs one of our packages."""
    return [sys.executable, "-m", name, *arguments]


class Child(Protocol):
    """Something that should be running and is restarted if it isn't."""

    name: str

    def start(self) -> None:
        """Start it; called again after every crash."""

    def alive(self) -> bool:
        """Whether it's running."""

    def last_words(self) -> str:
        """Why it died, if that can be determined."""

    def stop(self) -> None:
        """Ask it to stop; returns immediately."""

    def gone(self, seconds: float) -> bool:
        """Wait up to `seconds` for it to end; returns whether it has."""

    def kill(self) -> None:
        """Kill it and everything it started."""


class Program:
    """A child process that writes to a log file."""

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
        """The process id; None before the start."""
        return self._process.pid if self._process else None

    @property
    def code(self) -> int | None:
        """The exit code once the process has ended; negative for a signal."""
        return self._process.poll() if self._process else None

    def alive(self) -> bool:
        """Whether it's running. Remembers a dead process's group until its last member is gone."""
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
        """Wait up to `seconds`; returns whether it and everything it started have ended."""
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
        """SIGKILL its process group and those of its earlier runs."""
        if self._process is None:
            return
        self.alive()
        for group in {self._process.pid, *self._orphans}:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._process.wait()
        self._killed = True


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Queue:
    """The embedded queue server as a child. Must be started from the main thread."""

    name = "queue server"

    def __init__(self, data: Path, binary: Path | None) -> None:
        self._data, self._binary = data, binary
        self._server: EmbeddedServer | None = None

    def start(self) -> None:
        """Start a server, or adopt a running one; returns once it answers."""
        if self._server is not None:
            self._server.stop()
        self._server = EmbeddedServer.ensure(self._data, self._binary)

    @property
    def url(self) -> str:
        """Its address; stays the same after restarts."""
        assert self._server is not None
        return self._server.url

    def alive(self) -> bool:
        """Whether the process is running, from its lock, because it may be too busy to answer."""
        return is_held(self._data / "queue.alive")

    def last_words(self) -> str:
        """The last line of its log."""
        return last_line(self._data / "queue.log")

    def stop(self) -> None:
        """Stop it, with everything saved, if we started it."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def gone(self, seconds: float) -> bool:
        """Always true, because `stop` waits."""
        return True

    def kill(self) -> None:
        """Like `stop`, which takes only milliseconds."""
        self.stop()


@dataclass(slots=True)
class ManagedChild:
    """A child and when to restart it; times are from the monotonic clock."""

    child: Child
    started: float = 0.0
    due: float | None = None
    backoff: Backoff = field(default_factory=Backoff)

    def tend(self) -> str | None:
        """Restart the child if it's dead and due; returns a sentence if anything changed."""
        now = time.monotonic()
        if self.due is None:
            if self.child.alive():
                return None
            pause = self.backoff.failed(now - self.started)
            self.due = now + pause
            why = self.child.last_words()
            return f"the {self.child.name} died ({why}); restarting it in {pause:g} s"
        if now < self.due:
            return None
        try:
            self.start()
        except ImagemillError as error:
            self.due = now + self.backoff.pause
            return f"couldn't restart the {self.child.name}: {error}"
        return f"the {self.child.name} is running again"

    def start(self) -> None:
        """Start the child now."""
        self.child.start()
        self.started, self.due = time.monotonic(), None


def open_log(path: Path) -> IO[bytes]:
    """Open the log for appending; a large one is first renamed to `.1`."""
    try:
        if path.stat().st_size > LARGEST_LOG:
            path.replace(path.with_name(f"{path.name}.1"))
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def last_line(path: Path) -> str:
    """The last non-blank line of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return f"nothing in {path}"
    texts = [line.strip() for line in lines if line.strip()]
    return texts[-1][:300] if texts else f"nothing in {path}"
