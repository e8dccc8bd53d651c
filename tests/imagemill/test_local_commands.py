"""`down`, `logs`, `download` and `status --watch`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.commands import local
from imagemill.commands import status as status_module
from imagemill.local.up_lock import running
from tests.imagemill.fake_server import FakeServer
from tests.imagemill.terminals import in_terminal
from tests.imagemill.test_generate import run, server
from tests.waiting import wait_until

__all__ = ["server"]

HOLDER = """
import os, signal, sys
from pathlib import Path
from imagemill.local.up_lock import Record, announce, claimed
data = Path(sys.argv[1])
with claimed(data):
    announce(data, Record(os.getpid(), "http://127.0.0.1:1", sys.argv[2] == "private"))
    signal.pause()
"""
"""What `up` does with its folder: it holds the lock until a signal ends it."""


@pytest.fixture(params=["shared"])
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), request.param]) as process:
        wait_until(lambda: running(tmp_path))
        yield process
        process.kill()


@pytest.mark.parametrize("flags", [[], ["--now"]])
def test_down_ends_the_server_of_the_folder(
    holder: "subprocess.Popen[bytes]", tmp_path: Path, flags: list[str]
) -> None:
    done = run("down", "--data", tmp_path, *flags)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "stopped"
    holder.wait()
    assert running(tmp_path) is None
    done = run("down", "--data", tmp_path)
    assert (done.exit_code, done.stdout) == (0, f"no server is running on {tmp_path}\n")


@pytest.mark.parametrize("holder", ["private"], indirect=True)
def test_down_leaves_the_server_of_a_generate(
    holder: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    done = run("down", "--data", tmp_path)
    assert done.exit_code == 2
    assert "belongs to a running `generate` and ends with it" in done.stderr
    assert running(tmp_path) is not None


def test_logs_shows_the_last_lines_of_each(tmp_path: Path) -> None:
    (tmp_path / "service.log").write_text("".join(f"service {n}\n" for n in range(50)))
    (tmp_path / "workers.log").write_bytes(b"w\x1b[2J \xff\ty\nnot complete")
    done = run("logs", "--data", tmp_path, "--lines", 2)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"==> {tmp_path}/service.log <==",
        "service 48",
        "service 49",
        "",
        f"==> {tmp_path}/workers.log <==",
        "w\N{REPLACEMENT CHARACTER}[2J \N{REPLACEMENT CHARACTER} y",
    ]
    assert run("logs", "service", "--data", tmp_path, "-n", 1).stdout == "service 49\n"
    done = run("logs", "queue", "--data", tmp_path)
    assert (done.exit_code, done.stderr) == (2, f"error: no queue log in {tmp_path}\n")
    done = run("logs", "--data", tmp_path / "none")
    assert (done.exit_code, done.stderr) == (2, f"error: no log in {tmp_path}/none\n")


def test_a_log_is_followed_through_its_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "TAIL_BYTES", 10)
    path = tmp_path / "service.log"
    log = local._Log(path)
    assert log.last(5) == []
    path.write_text("one\ntwo\nthree\nfo")
    assert log.last(5) == ["three"]
    with path.open("a") as file:
        file.write("ur\n")
    assert list(log.new()) == ["four"]
    assert list(log.new()) == []
    path.write_text("new\n")
    assert list(log.new()) == ["new"]


def test_download_saves_what_is_finished(server: FakeServer, tmp_path: Path) -> None:
    server.fails = {"bad"}
    run("generate", "a", "b", "bad", "c", "--detach")
    out = tmp_path / "x" / "out"
    for _ in range(3):  # the fake server finishes an image per look
        run("status", "job-1")
    server.holds = True
    done = run("download", "job-1", "--out", out)
    assert (done.exit_code, done.stdout) == (
        0,
        f"2 of 4 images in {out}, 1 not finished yet, 1 failed\n",
    )
    assert sorted(path.name for path in out.iterdir()) == ["0000-a.png", "0001-b.png"]
    server.holds = False
    document = json.loads(run("download", "job-1", "--out", out, "--json").stdout)
    assert document["images"][2] == {"index": 3, "file": "0003-c.png"}
    assert (document["id"], document["counts"]["failed"]) == ("job-1", 1)
    assert "3 already downloaded" in run("download", "job-1", "--out", out).stdout
    assert server.calls["GET /v1/jobs/ID/images/0"] == 1
    assert "POST /v1/jobs/ID/retry" not in server.calls
    assert run("download", "job-9", "--out", out).exit_code == 1


def test_status_is_watched_until_the_job_ends(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "WATCH_PAUSE", 0.001)
    run("generate", "a", "b", "--detach")
    done = run("status", "job-1", "--watch")
    assert done.exit_code == 0, done.output
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("state")] == [
        "running",
        "succeeded",
    ]
    assert run("status", "--watch", "--json").exit_code == 2


def test_a_watched_list_ends_with_ctrl_c(server: FakeServer, tmp_path: Path) -> None:
    run("generate", "a", "--detach", "--title", "Blue hearts")
    variables = {"IMAGEMILL_SERVER": server.url}
    ran = in_terminal(80, "status", "--watch", interrupt_at="Blue hearts", variables=variables)
    assert ran.code == 130, ran.said
    assert ran.is_restored and "Traceback" not in ran.said
