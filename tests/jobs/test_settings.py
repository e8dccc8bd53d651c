"""Settings come from the environment, once, and are checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.errors import ConfigurationError
from jobs.settings import QueueSettings


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_DATA", "/srv/mill")
    monkeypatch.setenv("IMAGEMILL_LEASE_SECONDS", "2.5")
    settings = QueueSettings.read(pool="p1")
    assert (settings.data, settings.lease_seconds) == (Path("/srv/mill"), 2.5)
    assert (settings.pool, settings.redis_url) == ("p1", None)


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_DATA", "/srv/mill")
    assert QueueSettings.read(data=Path("/other")).data == Path("/other")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_SECONDS", "0"),
        ("LEASE_SECONDS", "soon"),
        ("POOL", "a{b}"),
        ("MAX_UNFINISHED", "0"),
        ("MAX_STALLS", "-1"),
    ],
)
def test_a_value_that_cannot_work_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"IMAGEMILL_{name}", value)
    with pytest.raises(ConfigurationError, match=f"IMAGEMILL_{name}"):
        QueueSettings.read()


def test_settings_are_never_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        QueueSettings.read().pool = "other"  # type: ignore[misc]


@pytest.mark.parametrize("module", ["workers", "service"])
def test_a_data_folder_that_cannot_be_is_one_sentence(module: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = subprocess.run(
        [sys.executable, "-m", module],
        env={**os.environ, "IMAGEMILL_DATA": str(tmp_path / "file" / "data")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert "IMAGEMILL_DATA" in told.stderr
    assert told.stderr.count("\n") == 1
