"""Children of `up`: restarts with growing pauses, exit reasons, and their environment."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imagemill.local import children
from imagemill.local.children import ManagedChild, Program, environment, last_line, module, open_log
from imagemill.local.up import Launcher, UpOptions
from jobs.catalog import Catalog
from jobs.errors import ImagemillError
from jobs.runtime.settings import QueueSettings
from tests.waiting import PATIENCE, wait_until


@dataclass
class Pretend:
    """A child that the test starts and kills."""

    name: str = "thing"
    lives: bool = False
    starts: int = 0
    trouble: ImagemillError | None = None
    killed: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.starts += 1
        if self.trouble:
            raise self.trouble
        self.lives = True

    def alive(self) -> bool:
        return self.lives

    def last_words(self) -> str:
        return "no reason"

    def stop(self) -> None:
        self.lives = False

    def gone(self, seconds: float) -> bool:
        return not self.lives

    def kill(self) -> None:
        self.lives = False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(children.time, "monotonic", lambda: now[0])
    return now


def test_a_dead_child_is_restarted_after_growing_pauses(clock: list[float]) -> None:
    child = Pretend()
    managed = ManagedChild(child)
    managed.start()
    pauses = []
    for _ in range(9):
        assert managed.tend() is None
        child.lives = False
        news = managed.tend()
        assert news is not None
        assert "the thing died (no reason)" in news
        assert managed.due is not None
        pauses.append(managed.due - clock[0])
        clock[0] = managed.due - 0.01
        assert managed.tend() is None
        clock[0] += 0.02
        assert managed.tend() == "the thing is running again"
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    clock[0] += 61
    child.lives = False
    assert "in 0.5 s" in (managed.tend() or "")


def test_a_failed_start_is_retried(clock: list[float]) -> None:
    child = Pretend(lives=True)
    managed = ManagedChild(child, started=clock[0])
    child.lives, child.trouble = False, ImagemillError("no room")
    managed.tend()
    clock[0] += 1
    assert managed.tend() == "couldn't restart the thing: no room"
    assert managed.tend() is None
    child.trouble = None
    clock[0] += 60
    assert managed.tend() == "the thing is running again"


def test_last_words_of_a_program(tmp_path: Path) -> None:
    code = "print('one'); print('the reason'); print(); raise SystemExit(2)"
    program = Program(
        "it", [sys.executable, "-c", code], dict(os.environ), tmp_path / "logs" / "it.log"
    )
    program.start()
    assert program.gone(PATIENCE)
    assert (program.code, program.last_words()) == (2, "exit code 2: the reason")


def test_kill_reaches_grandchildren(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    log = tmp_path / "it.log"
    program = Program("it", [sys.executable, "-c", code], dict(os.environ), log)
    program.start()
    wait_until(lambda: log.exists() and log.read_text().strip().isdecimal())
    grandchild = int(log.read_text())
    program.kill()
    assert program.last_words() == "killed by SIGKILL"
    wait_until(lambda: not is_alive(grandchild))


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_packages_in_the_current_folder_do_not_shadow_ours(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise SystemExit('the wrong jobs')")
    done = subprocess.run(
        [*module("imagemill"), "--help"], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_settings_become_variables() -> None:
    env = environment(data=Path("/x"), port=7, redis_url=None)
    assert (env["IMAGEMILL_DATA"], env["IMAGEMILL_PORT"]) == ("/x", "7")
    assert env.get("IMAGEMILL_REDIS_URL") == os.environ.get("IMAGEMILL_REDIS_URL")


def test_a_large_log_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "LARGEST_LOG", 10)
    log = tmp_path / "it.log"
    log.write_text("a long first line\n")
    open_log(log).close()
    assert (tmp_path / "it.log.1").read_text() == "a long first line\n"
    assert last_line(log).startswith("nothing in")


def test_a_second_stop_kills_children_that_do_not_end(tmp_path: Path) -> None:
    class Stubborn(Pretend):
        def stop(self) -> None:
            return

    data = tmp_path / "data"
    data.mkdir()
    options = UpOptions("127.0.0.1", 1, data, tmp_path / "models.toml")
    said: list[object] = []
    settings = QueueSettings(data=data)
    launcher = Launcher(options, settings, Catalog({}), 1, "http://x", said.append, said.append)
    child = Stubborn(lives=True)
    launcher._children = [ManagedChild(child)]
    launcher.stop()
    launcher.stop()
    launcher._end()
    assert not child.lives
