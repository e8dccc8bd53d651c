"""The locks of a data folder, between real processes where that matters."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from imagemill.client.errors import AlreadyRunning, StartFailed
from imagemill.local.up_lock import Record, Users, announce, claimed, is_held, is_used, running

HOLD = """
import sys, pathlib
from imagemill.local.up_lock import Record, announce, claimed
with claimed(pathlib.Path(sys.argv[1])):
    announce(pathlib.Path(sys.argv[1]), Record(7, "http://127.0.0.1:1", False))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_up_a_folder_and_the_second_learns_the_address(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    with claimed(tmp_path):
        announce(tmp_path, Record(os.getpid(), "http://127.0.0.1:8000", False))
        assert running(tmp_path) == Record(os.getpid(), "http://127.0.0.1:8000", False)
        with (
            pytest.raises(AlreadyRunning, match=r"at http://127.0.0.1:8000 \(process \d+\)"),
            claimed(tmp_path),
        ):
            pytest.fail("claimed twice")
        assert running(tmp_path) is not None
    assert running(tmp_path) is None
    assert not is_held(tmp_path / "up.lock")


def test_a_killed_holder_leaves_no_claim(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert running(tmp_path) == Record(7, "http://127.0.0.1:1", False)
        holder.kill()
    assert running(tmp_path) is None
    with claimed(tmp_path):
        assert not (tmp_path / "up.json").exists()


def test_the_last_user_can_be_told(tmp_path: Path) -> None:
    first, second, up = Users(tmp_path), Users(tmp_path), Users(tmp_path)
    assert first.join()
    assert second.join()
    assert not up.is_empty()
    first.leave()
    assert not up.is_empty()
    second.leave()
    assert up.is_empty()
    late = Users(tmp_path)
    assert not late.join()
    up.leave()
    assert late.join()
    late.leave()


def test_a_private_up_is_used_until_its_last_user_has_left(tmp_path: Path) -> None:
    assert not is_used(tmp_path)
    user, up = Users(tmp_path), Users(tmp_path)
    assert user.join()
    assert is_used(tmp_path)
    user.leave()
    assert not is_used(tmp_path)
    assert up.is_empty()
    assert not is_used(tmp_path), "it is ending"
    up.leave()


def test_an_up_that_has_not_told_its_address_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def sleep(_: float) -> None:
        clock[0] += 1
        if clock[0] == 20:
            announce(tmp_path, Record(7, "http://127.0.0.1:1", False))

    with claimed(tmp_path):
        time = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
        monkeypatch.setattr("imagemill.local.up_lock.time", time)
        with pytest.raises(AlreadyRunning, match=r"at http://127\.0\.0\.1:1"), claimed(tmp_path):
            pytest.fail("claimed twice")


def test_a_folder_that_cannot_be_used_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartFailed, match="cannot use the data folder"), claimed(tmp_path / "file"):
        pytest.fail("claimed a file")


def test_a_private_one_is_called_so(tmp_path: Path) -> None:
    with claimed(tmp_path):
        announce(tmp_path, Record(1, "http://127.0.0.1:8000", True))
        with pytest.raises(AlreadyRunning, match="for a `generate`"), claimed(tmp_path):
            pytest.fail("claimed twice")


def test_a_broken_record_is_no_record(tmp_path: Path) -> None:
    with claimed(tmp_path):
        (tmp_path / "up.json").write_text('{"pid": 1}')
        assert running(tmp_path) is None
