"""The locks of a data folder, with real processes where that matters."""

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


def test_a_second_up_is_refused_with_the_address_of_the_first(tmp_path: Path) -> None:
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


def test_a_killed_holder_releases_the_lock(tmp_path: Path) -> None:
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


def test_is_empty_once_the_last_user_has_left(tmp_path: Path) -> None:
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


def test_is_used_until_the_last_user_has_left(tmp_path: Path) -> None:
    assert not is_used(tmp_path)
    user, up = Users(tmp_path), Users(tmp_path)
    assert user.join()
    assert is_used(tmp_path)
    user.leave()
    assert not is_used(tmp_path)
    assert up.is_empty()
    assert not is_used(tmp_path), "it is ending"
    up.leave()


def test_a_starting_up_is_given_time_to_announce_its_address(
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


def test_an_unusable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartFailed, match="can't use the data folder"), claimed(tmp_path / "file"):
        pytest.fail("claimed a file")


def test_the_error_mentions_a_private_up(tmp_path: Path) -> None:
    with claimed(tmp_path):
        announce(tmp_path, Record(1, "http://127.0.0.1:8000", True))
        with pytest.raises(AlreadyRunning, match="as a `generate` uses it"), claimed(tmp_path):
            pytest.fail("claimed twice")


def test_an_invalid_record_is_ignored(tmp_path: Path) -> None:
    with claimed(tmp_path):
        (tmp_path / "up.json").write_text('{"pid": 1}')
        assert running(tmp_path) is None
