"""Children notice their parent's death, even by SIGKILL, and even after an exec."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobs.runtime import lifeline
from tests.waiting import PATIENCE, wait_until

CHILD = """
import os, sys, threading
from jobs.runtime import lifeline
assert lifeline.watch(lambda: os._exit(9))
open(sys.argv[1], "w").write(str(os.getpid()))
threading.Event().wait()
"""
PARENT = """
import sys, threading
from jobs.runtime import lifeline
child = lifeline.spawn([sys.executable, "-c", *sys.argv[1:]])
threading.Event().wait()
"""
EXEC = """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""


def pid_in(path: Path) -> int:
    return int(wait_until(lambda: path.exists() and path.read_text()))


@pytest.mark.parametrize("through", [(), (EXEC,)], ids=["directly", "through an exec"])
def test_no_orphan_when_the_parent_is_killed(tmp_path: Path, through: tuple[str, ...]) -> None:
    pid_file = tmp_path / "pid"
    argv = [sys.executable, "-c", PARENT, *through, CHILD, str(pid_file)]
    with subprocess.Popen(argv) as parent:
        child = psutil.Process(pid_in(pid_file))
        assert child.ppid() == parent.pid
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_child_gets_the_environment_that_was_asked_for() -> None:
    child = lifeline.spawn(
        [sys.executable, "-c", "import os; print(sorted(os.environ))"],
        env={"ONLY": "this"},
        stdout=subprocess.PIPE,
        text=True,
    )
    names, _ = child.communicate(timeout=PATIENCE)
    assert "'ONLY'" in names
    assert "'IMAGEMILL_LIFELINE_FD'" in names
    assert "'PATH'" not in names


def test_a_missing_command_leaks_no_pipe() -> None:
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    with pytest.raises(FileNotFoundError):
        lifeline.spawn(["/nowhere/at/all"])
    after = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    assert len(after) == len(before)


@pytest.mark.parametrize("value", [None, "nonsense", "99999:1", "0:1"])
def test_a_process_that_was_not_spawned_watches_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """Even if it inherited the variable, and the descriptor is another file now."""
    monkeypatch.delenv(lifeline.LIFELINE, raising=False)
    if value is not None:
        monkeypatch.setenv(lifeline.LIFELINE, value)
    assert not lifeline.watch(lambda: None)
